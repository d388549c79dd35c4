"""Entries of tokenizers' vocabularies as people read them, with the ends of words marked."""

from __future__ import annotations

from collections.abc import Sequence

# How vocabularies write that a word begins (sentencepiece, byte-level BPE) or ends (CLIP).
_BEGINS = ("\u2581", "\u0120")
_ENDS = "</w>"


def readable_pieces(entries: Sequence[str]) -> tuple[str, ...]:
    """What a person reads for each token of a text; a piece that ends a word ends in a space.

    Letters and digits beside other characters are words of their own, as CLIP cuts them, so that a
    word is the same word in front of a comma.

    Args:
        entries: of the vocabulary, in the text's order.
    """
    texts = [_plain(entry) for entry in entries]
    found = []
    for at, text in enumerate(texts):
        last = at + 1 == len(texts)
        ends = last or entries[at].endswith(_ENDS) or _begins(entries[at + 1])
        if not ends and text and texts[at + 1]:
            ends = text[-1].isalnum() != texts[at + 1][0].isalnum()
        found.append(f"{text} " if ends else text)
    return tuple(found)


def _begins(entry: str) -> bool:
    return entry.startswith(_BEGINS)


def _plain(entry: str) -> str:
    text = entry.removesuffix(_ENDS)
    # Leading marks stand for spaces; in the middle of an entry they would be words of their own.
    for mark in _BEGINS:
        text = text.lstrip(mark)
    return text
