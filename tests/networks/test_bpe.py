"""The vocabulary: words are one token, all other text survives, and transformers' CLIPTokenizer agrees."""

import json

import pytest
import torch

from d2o.errors import UserError
from d2o.networks.bpe import BOS, EOS, build_tokens, byte_letters

WORDS = ["seven", "the", "three", "there", "eve", "handwritten", "hand", "written", "a", "élan"]


@pytest.fixture(scope="module")
def tokens():
    return build_tokens(WORDS)


def inner(tokens, text):
    """The tokens of a prompt without its marks."""
    ids = tokens.encode([text])[0].tolist()
    assert ids[0] == tokens.vocab[BOS]
    return tokens.tokenizer.convert_ids_to_tokens(ids[1 : ids.index(tokens.vocab[EOS])])


def test_every_word_is_one_token_though_they_share_letters(tokens):
    for word in WORDS:
        (token,) = inner(tokens, word.upper())
        assert tokens.tokenizer.decode([tokens.vocab[token]]) == word


def test_any_other_text_falls_into_smaller_tokens_and_comes_back(tokens):
    for text in ["zebra", "smørrebrød", "7", "語", "42 zebras !"]:
        parts = inner(tokens, text)
        assert EOS not in parts  # which is also the unknown token
        ids = [tokens.vocab[part] for part in parts]
        assert tokens.tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert len(inner(tokens, "sevens")) > 1


def test_prompts_are_padded_and_cut_to_77_with_both_marks(tokens):
    ids = tokens.encode(["", "seven " * 200])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert ids[0, 0] == tokens.vocab[BOS] and (ids[0, 1:] == tokens.vocab[EOS]).all()
    assert (
        ids[1, 0] == tokens.vocab[BOS]
        and ids[1, -1] == tokens.vocab[EOS]
        and (ids[1, 1:-1] == tokens.vocab["seven</w>"]).all()
    )


def test_the_vocabulary_depends_on_the_set_of_words_alone_and_is_laid_out_as_clip_s(tokens):
    assert build_tokens(reversed([*WORDS, "seven"])) == tokens
    ids = list(tokens.vocab.values())
    assert ids == list(range(512 + len(tokens.merges) + 2))
    assert sorted(byte_letters()) == list(range(256)) and len(set(byte_letters().values())) == 256
    assert list(tokens.vocab)[:3] == ["!", '"', "#"] and list(tokens.vocab)[-2:] == [BOS, EOS]  # as in CLIP's own file
    files = tokens.files()
    assert json.loads(files["vocab.json"]) == tokens.vocab
    assert files["merges.txt"].splitlines()[1:] == [" ".join(pair) for pair in tokens.merges]


@pytest.mark.parametrize("word", ["two words", "7", "Seven", ""])
def test_only_words_make_a_vocabulary(word):
    with pytest.raises(UserError, match="not a word"):
        build_tokens(["seven", word])
