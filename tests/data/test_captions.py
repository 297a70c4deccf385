"""Captions made from class labels."""

import pytest
import torch

from d2o.data.captions import Captions, class_names
from d2o.errors import UserError
from d2o.methods.base import Draws

DIGITS = class_names([str(i) for i in range(10)])


def test_numbers_are_called_by_word_and_numeral_folders_by_their_name():
    assert DIGITS[7] == ["seven", "7"] and DIGITS[0] == ["zero", "0"]
    assert class_names(["07", "20", "21"]) == [["seven", "7"], ["twenty", "20"], ["21"]]
    assert class_names(["golden_retriever", "Red Fox"]) == [["golden retriever"], ["red fox"]]


def test_every_template_meets_every_name_and_the_first_of_each_is_the_main_caption():
    captions = Captions(DIGITS, ["a handwritten {name}", "{name}"])
    assert captions.table[7] == ["a handwritten seven", "a handwritten 7", "seven", "7"]
    assert (
        captions.main(3) == "a handwritten three"
        and len(captions.all) == 40
        and captions.all[4] == captions.table[1][0]
    )
    mixed = Captions([["cat"], ["seven", "7"]], ["a {name}"])
    assert [len(row) for row in mixed.table] == [2, 2] and set(mixed.table[0]) == {"a cat"}


def test_the_choice_follows_from_the_draws_alone_and_has_the_stated_shares():
    captions = Captions(DIGITS, ["a handwritten {name}", "{name}", "the digit {name}"])
    whole = captions.choose(Draws(5, 0, 6000, 6000, torch.device("cpu")).rand(), 0.4)
    parts = [captions.choose(Draws(5, start, 2000, 6000, torch.device("cpu")).rand(), 0.4) for start in (0, 2000, 4000)]
    assert torch.equal(whole, torch.cat(parts))
    share = torch.bincount(whole, minlength=6) / 6000
    assert share[0] == pytest.approx(0.4, abs=0.02) and all(
        share[i] == pytest.approx(0.12, abs=0.02) for i in range(1, 6)
    )


def test_the_ends_of_the_choice():
    captions = Captions([["cat"]], ["a {name}", "{name}"])
    u = torch.tensor([0.0, 0.3, 0.999999])
    assert captions.choose(u, 1.0).tolist() == [0, 0, 0] and captions.choose(u, 0.0).tolist() == [1, 1, 1]
    assert Captions([["cat"]], ["{name}"]).choose(u, 0.0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("templates", [[], ["a picture"], ["{name} and {name}"], ["{name} {other}"]])
def test_templates_that_make_no_caption_are_refused(templates):
    with pytest.raises(UserError, match="template"):
        Captions(DIGITS, templates)
