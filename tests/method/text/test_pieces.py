"""Vocabularies' entries as people read them, whoever's vocabulary it is."""

from __future__ import annotations

import pytest

from perfusion.text.pieces import readable_pieces

CLIP = ("<|startoftext|>", "a</w>", "bird", "bath</w>", ",</w>", "café</w>", "<|endoftext|>")
T5 = ("▁", "a", "▁bird", "bath", ",", "▁old", "</s>", "<pad>")
QWEN = ("bird", "bath", "Ġold", "'s", "Ġ2", "x", "<|im_end|>")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (CLIP[1:-1], ["a", "birdbath", ",", "café"]),
        (T5[:-2], ["a", "birdbath", ",", "old"]),
        (QWEN[:-1], ["birdbath", "old", "'s", "2x"]),
        (("▁▁mug",), ["mug"]),
        ((), []),
    ],
)
def test_words_end_where_the_text_has_an_end_of_a_word(entries, words):
    pieces = readable_pieces(entries)
    assert len(pieces) == len(entries)
    text = "".join(pieces)
    assert text.split() == words
    assert text == "" or text.endswith(" ")


def test_pieces_of_a_word_stay_together():
    assert readable_pieces(T5)[:5] == ("", "a ", "bird", "bath ", ", ")
    assert readable_pieces(CLIP)[2:4] == ("bird", "bath ")
