"""What a batch is asked to be, as one value."""

import pytest
import torch

from d2o.condition import Condition, Text, join_embedded
from d2o.errors import UserError

LABELS = Condition.of_labels([3, 1, 4])
PROMPTS = Condition.of_prompts(["a seven", "", "nine"])
ALL = [Condition.none(3), LABELS, PROMPTS, Condition.of_labels([5, -1]), LABELS[:0], PROMPTS[:0]]


def plain(condition):
    labels = None if condition.labels is None else condition.labels.tolist()
    return condition.kind, condition.n, labels, condition.prompts


def test_kinds_and_lengths():
    assert [c.kind for c in ALL] == ["none", "labels", "prompts", "labels", "labels", "prompts"]
    assert [len(c) for c in ALL] == [3, 3, 3, 2, 0, 0]
    assert LABELS.labels.dtype == torch.int64 and Condition.of_labels(torch.tensor([2.0])).labels.tolist() == [2]
    with pytest.raises(ValueError, match="not of both"):
        Condition(1, torch.tensor([1]), ("a",))
    with pytest.raises(ValueError, match="2 labels for 3 samples"):
        Condition(3, torch.tensor([1, 2]))
    for wrong in ("a seven", ["a", 7]):
        with pytest.raises(UserError, match="a list of strings"):
            Condition.of_prompts(wrong)


@pytest.mark.parametrize("condition", ALL)
def test_slices_joins_and_repeats_are_those_of_its_parts(condition):
    n = len(condition)
    assert plain(Condition.join([condition[:1], condition[1:]])) == plain(condition)
    assert plain(condition[torch.arange(n).flip(0)][torch.arange(n).flip(0)]) == plain(condition)
    assert plain(condition.repeat(2)[n:]) == plain(condition) and len(condition.repeat(3)) == 3 * n
    assert plain(condition.to("cpu")) == plain(condition) and plain(condition[5:]) == plain(condition.repeat(0))


def test_the_empty_one_is_of_the_same_kind_and_length():
    assert LABELS.empty().labels.tolist() == [-1, -1, -1] and PROMPTS.empty().prompts == ("", "", "")
    assert plain(Condition.none(3).empty()) == plain(Condition.none(3))
    with pytest.raises(ValueError, match="labels, prompts cannot be joined"):
        Condition.join([LABELS, PROMPTS])


def test_encoded_prompts_are_cut_and_joined_together():
    text, plain = Text(torch.randn(4, 7, 5), torch.randn(4, 3)), Text(torch.randn(4, 7, 5))
    assert len(text) == 4 and len(text[1:3]) == 2 and torch.equal(text[torch.tensor([2])].pooled, text.pooled[2:3])
    assert plain[:2].pooled is None and plain.to(torch.device("cpu")).pooled is None
    both = join_embedded(text[:1], text[2:])
    assert torch.equal(both.states, text.states[[0, 2, 3]]) and torch.equal(both.pooled, text.pooled[[0, 2, 3]])
    assert join_embedded(plain, plain).pooled is None and join_embedded(None, None) is None
    assert join_embedded(torch.tensor([1]), torch.tensor([-1])).tolist() == [1, -1]
