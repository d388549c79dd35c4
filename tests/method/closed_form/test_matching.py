"""Tokens that answer to each other where tokenizers cut words otherwise at the start of a text."""

from __future__ import annotations

import pytest
import torch

from perfusion.closed_form.matching import contains, find_phrases, match_in_order, words_of
from perfusion.closed_form.time import time_constraints
from perfusion.closed_form.uce import moderation_constraints
from perfusion.text.encoded_prompt import EncodedPrompt
from perfusion.text.pieces import readable_pieces

WHOLE = ("mug", "bag", "blue", "a", "thing")


class Bytes:
    """Cuts text like byte-level BPE, without start and end: a first word has entries of its own."""

    def __init__(self, suffix: tuple[str, ...] = ()) -> None:
        self.suffix = suffix
        self.ids: dict[str, int] = {}

    def __call__(self, prompts):
        return [self.prompt(text) for text in prompts]

    def prompt(self, text: str) -> EncodedPrompt:
        entries: list[str] = []
        for at, word in enumerate(text.split()):
            # Within a text a known word is one entry, at its start it is cut in two.
            space = "Ġ" if at else ""
            cut = [space + word[:1], word[1:]][: len(word)]
            entries += [space + word] if at and word in WHOLE else cut
        words = len(entries)
        entries += self.suffix
        tokens = tuple(self.ids.setdefault(entry, len(self.ids)) for entry in entries)
        rows = [
            torch.randn(8, generator=torch.Generator().manual_seed(token)).double() + at
            for at, token in enumerate(tokens)
        ]
        encodings = torch.stack(rows) if rows else torch.zeros(0, 8).double()
        return EncodedPrompt(text, tokens, readable_pieces(entries), 0, words, encodings)


def test_a_word_cut_otherwise_is_matched_at_its_end():
    encode = Bytes()
    source, destination = encode(["bag", "a blue bag"])
    assert source.pieces == ("b", "ag ")
    assert destination.pieces == ("a ", "blue ", "bag ")
    assert match_in_order(source, destination) == [2, 2]
    assert match_in_order(destination, encode.prompt("a new blue bag"))[-1] == 4


def test_a_template_behind_the_words_answers_to_itself():
    encode = Bytes(("<|im_end|>", "assistant"))
    source, destination = encode(["bag", "a blue bag"])
    assert match_in_order(source, destination) == [2, 2, 3, 4]


def test_a_phrase_is_found_by_its_words_not_by_its_tokens():
    encode = Bytes()
    prompt, other = encode(["a mug here", "a thing here"])
    phrase = [word.text for word in words_of(encode.prompt("mug"))]
    assert find_phrases(prompt, phrase, other, ["thing"]) == (slice(1, 2), slice(1, 2))
    first = encode(["mug here", "bag here"])
    assert find_phrases(first[0], ["mug"], first[1], ["bag"]) == (slice(0, 2), slice(0, 2))
    with pytest.raises(ValueError, match="more than one phrase"):
        find_phrases(prompt, [], other, [])


def test_containing_is_a_matter_of_words_and_nothing_is_contained_nowhere():
    assert contains(["a", "big", "cat"], ["big", "cat"])
    assert not contains(["a", "bigcat"], ["cat"])
    assert not contains(["a"], [])


def test_without_a_start_token_an_added_first_word_is_carried_beyond_the_word_behind_it():
    encode = Bytes()
    source, destination = encode(["a bag", "blue bag"])
    plain, carried = (
        time_constraints(encode, "bag", "blue bag", augment=False, carry=carry)
        for carry in (0.0, 0.5)
    )
    rows = destination.encodings
    difference = (carried.targets - plain.targets)[0]
    # "blue" is cut in two; both have more than "bag" has, by which they are counted.
    wanted = 0.5 * (rows[0] - rows[2]) + 0.5 * (rows[1] - rows[2])
    torch.testing.assert_close(difference, wanted)
    assert source.first == 0


def test_an_empty_prompt_without_an_end_token_says_what_its_last_token_says():
    encode = Bytes(("<|im_end|>", "assistant"))
    found = moderation_constraints(encode, ["mug"])
    assert torch.equal(found.targets[0], encode.prompt("").encodings[0])
    begun = Bytes()
    only_start = EncodedPrompt("", (0,), ("<bos> ",), 1, 1, torch.ones(1, 8).double())
    found = moderation_constraints(
        lambda texts: [only_start if not text else begun.prompt(text) for text in texts], ["mug"]
    )
    assert torch.equal(found.targets[0], torch.ones(8).double())
