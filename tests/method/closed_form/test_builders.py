"""Which token is asked to become which, for TIME, MACE's refinement and UCE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perfusion.closed_form.constraints import Constraints
from perfusion.closed_form.erasure import (
    GENERIC_ANCHOR,
    Erasure,
    check_erasures,
    parse_erasures,
)
from perfusion.closed_form.mace import SENTENCES, refinement_constraints
from perfusion.closed_form.matching import match_in_order, words_of
from perfusion.closed_form.preserve import preserve
from perfusion.closed_form.solver import solve
from perfusion.closed_form.time import time_constraints
from perfusion.closed_form.uce import (
    Debiasing,
    concept_vectors,
    debias_constraints,
    moderation_constraints,
    preserving_constraints,
    replacement_constraints,
)
from perfusion.gated.covariance import Covariance

START, END, PAD = "<start>", "<end>", "<pad>"
SENTENCE = ("a {} here",)


def pairs(toy, source: str, destination: str) -> list[tuple[str, str]]:
    before, after = toy.prompt(source), toy.prompt(destination)
    matched = match_in_order(before, after)
    names = [after.pieces[at].strip() for at in matched]
    return list(zip((piece.strip() for piece in before.pieces), names, strict=True))


def asked(constraints: Constraints, sources, destinations) -> list[tuple[str, str]]:
    """Each constraint as the places of its input and of its target, found by the encodings."""

    def name(row, prompts):
        for prompt in prompts:
            for at, encoding in enumerate(prompt.encodings):
                if torch.equal(encoding, row):
                    return f"{prompt.text}|{at}"
        raise AssertionError("an encoding of no prompt")

    rows = zip(constraints.inputs, constraints.targets, strict=True)
    return [(name(before, sources), name(after, destinations)) for before, after in rows]


def test_words_answer_to_the_same_words_and_padding_to_padding(toy):
    found = pairs(toy, "a pack of roses", "a pack of blue roses")
    assert found[:6] == [(w, w) for w in (START, "a", "pack", "of", "roses", END)]
    assert set(found[6:]) == {(PAD, PAD)}
    before, after = toy.prompt("a pack of roses"), toy.prompt("a pack of blue roses")
    # The destination has less padding: its last answers to what is left over.
    assert match_in_order(before, after)[5:] == [6, 7, 8, 9, 10, 11, 11]


def test_words_of_several_tokens_and_repeated_words_are_matched_in_order(toy):
    before, after = toy.prompt("a bird-bath a"), toy.prompt("a big a bird-bath big a")
    assert match_in_order(before, after)[:6] == [0, 1, 4, 5, 7, 8]


def test_case_is_the_tokenizers_business(toy):
    assert pairs(toy, "A CAT", "a red cat")[2] == ("cat", "cat")


def test_a_source_word_missing_in_the_destination_is_named_whole(toy):
    with pytest.raises(ValueError, match=r"word 'birdbath' of the source 'a bird-bath' is missing"):
        time_constraints(toy, "a bird-bath", "a red bird-house")
    with pytest.raises(ValueError, match=r"'cat' of the source.*another order"):
        time_constraints(toy, "a cat", "cat a")
    words = words_of(toy.prompt("one two-three-four five"))
    assert [(word.text, word.start, word.stop) for word in words] == [
        ("one", 1, 2),
        ("twothreefour", 2, 5),
        ("five", 5, 6),
    ]


def test_all_words_that_cannot_be_matched_are_named(toy):
    with pytest.raises(ValueError, match=r"words 'big', 'dog' of the source .* are missing"):
        time_constraints(toy, "a big cat and dog", "a small cat and bird")


def test_an_article_may_change_with_the_word_behind_it(toy):
    found = pairs(toy, "a bag", "an expensive bag")
    assert found[:4] == [(START, START), ("a", "an"), ("bag", "bag"), (END, END)]
    assert pairs(toy, "an owl on a chair", "a brown owl on an old chair")[1:6] == [
        ("an", "a"),
        ("owl", "owl"),
        ("on", "on"),
        ("a", "an"),
        ("chair", "chair"),
    ]
    # The article asks for a change too: its counterpart is another token.
    asked_for = time_constraints(toy, "a bag", "an expensive bag", augment=False)
    assert asked_for.moved.tolist() == [False, *[True] * 11]


def test_a_piece_of_a_word_is_no_article(toy):
    with pytest.raises(ValueError, match="word 'atoll' of the source"):
        time_constraints(toy, "a-toll", "an-toll big")


def test_added_words_that_no_word_can_take_on_are_refused_with_the_remedy(toy):
    with pytest.raises(ValueError, match=r"'a mug' has the encoding.*set carry above 0"):
        time_constraints(toy, "a mug", "a mug blue", with_padding=False)
    assert time_constraints(toy, "a mug", "a mug blue", True, 0.5, False).moved.any()


def test_time_asks_for_every_token_in_every_prompt(toy):
    found = time_constraints(toy, "a cat", "a red cat")
    assert len(found) == 4 * 12
    single = time_constraints(toy, "a cat", "a red cat", augment=False)
    before, after = toy.prompt("a cat"), toy.prompt("a red cat")
    wanted = [(0, 0), (1, 1), (2, 3), *((at, min(at + 1, 11)) for at in range(3, 12))]
    assert asked(single, [before], [after]) == [(f"a cat|{x}", f"a red cat|{y}") for x, y in wanted]
    # What stands before the new word stays where it is.
    assert single.moved.tolist() == [False, False, *[True] * 10]


def test_the_added_words_may_be_carried_over_to_the_word_beside_them(toy):
    plain, carried = (
        time_constraints(toy, "a cat here", "a big red cat here now", False, carry)
        for carry in (0.0, 0.5)
    )
    after = toy.prompt("a big red cat here now").encodings
    difference = carried.targets - plain.targets
    assert difference.any(1).nonzero().flatten().tolist() == [2, 3]
    torch.testing.assert_close(difference[2], 0.5 * (after[2] + after[3] - 2 * after[1]))
    torch.testing.assert_close(difference[3], 0.5 * (after[6] - after[5]))


def test_the_padding_may_be_left_out(toy):
    found = time_constraints(toy, "a cat", "a red cat", augment=False, with_padding=False)
    assert len(found) == 3
    whole = time_constraints(toy, "a cat", "a red cat", augment=False)
    assert torch.equal(found.targets, whole.targets[:3])


@pytest.mark.parametrize(
    ("source", "destination", "message"),
    [
        ("", "a cat", "source prompt is empty"),
        ("a cat", "  ", "destination prompt is empty"),
        ("a cat", "A CAT", "same words: there is nothing to edit"),
    ],
)
def test_prompts_that_ask_for_nothing_are_refused(toy, source, destination, message):
    with pytest.raises(ValueError, match=message):
        time_constraints(toy, source, destination)


def test_refinement_moves_everything_but_the_phrase_itself(toy):
    found = refinement_constraints(toy, [Erasure("big cat", "animal")], SENTENCE)
    before, after = toy.prompt("a big cat here"), toy.prompt("a animal here")
    wanted = [(0, 0), (1, 1), (4, 3), *((at, at - 1) for at in range(5, 12))]
    names = [(f"{before.text}|{x}", f"{after.text}|{y}") for x, y in wanted]
    assert asked(found, [before], [after]) == names
    phrase = before.encodings[2:4]
    assert not any(torch.equal(row, own) for row in found.inputs for own in phrase)


def test_an_anchor_longer_than_the_target_shifts_the_rest(toy):
    found = refinement_constraints(toy, [Erasure("cat", "small animal")], SENTENCE)
    before, after = toy.prompt("a cat here"), toy.prompt("a small animal here")
    assert asked(found, [before], [after])[2] == ("a cat here|3", "a small animal here|4")
    assert asked(found, [before], [after])[-1] == ("a cat here|11", "a small animal here|11")


def test_a_target_that_the_sentence_says_too_is_found_in_its_own_place(toy):
    found = replacement_constraints(toy, [Erasure("cat", "dog")], ("cat on cat {} cat",))
    before, after = toy.prompt("cat on cat cat cat"), toy.prompt("cat on cat dog cat")
    assert asked(found, [before], [after]) == [(f"{before.text}|4", f"{after.text}|4")]


def test_replacement_moves_the_last_token_of_the_phrase_alone(toy):
    found = replacement_constraints(toy, [Erasure("big cat", "animal"), Erasure("dog")])
    sources, destinations = toy(["big cat", "dog"]), toy(["animal", GENERIC_ANCHOR])
    assert asked(found, sources, destinations) == [
        ("big cat|2", "animal|1"),
        ("dog|1", f"{GENERIC_ANCHOR}|1"),
    ]


def test_there_are_at_least_thirty_different_sentences():
    assert len(set(SENTENCES)) >= 30


def test_erasures_are_read_a_line_at_a_time():
    found = parse_erasures(" cat -> animal \n\nblue car->vehicle\ndog\nhouse ->")
    assert found == [
        Erasure("cat", "animal"),
        Erasure("blue car", "vehicle"),
        Erasure("dog", GENERIC_ANCHOR),
        Erasure("house", GENERIC_ANCHOR),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n ", "at least one phrase to erase"),
        ("-> animal", "target in the line '-> animal' is empty"),
        ("a -> b -> c", "one 'target -> anchor' a line"),
        ("cat -> a\nCat -> b", "'cat' is named twice"),
    ],
)
def test_lines_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_erasures(text)


def test_contradictions_are_refused_by_name(toy):
    check_erasures(toy, [Erasure("cat", "animal")], ["a dog", "catfish"])
    with pytest.raises(ValueError, match="target 'CAT' is equal to its anchor"):
        check_erasures(toy, [Erasure("CAT", "cat")])
    with pytest.raises(ValueError, match="anchor 'dog' of 'cat' is to be erased itself"):
        check_erasures(toy, [Erasure("cat", "dog"), Erasure("dog", "animal")])
    with pytest.raises(ValueError, match="'big red cat' contains the preserved phrase 'red cat'"):
        check_erasures(toy, [Erasure("big red cat", "animal")], ["red cat"])
    with pytest.raises(ValueError, match="preserved text 'a cat here' contains the target 'cat'"):
        check_erasures(toy, [Erasure("cat", "animal")], ["a cat here"])


def test_debiasing_pushes_by_the_share_that_is_missing(toy):
    asked_for = Debiasing("doctor", ("woman", "man"), (0.1, 0.9), step=2.0)
    found = debias_constraints(toy, [asked_for])
    doctor, woman, man = concept_vectors(toy, ["doctor", "woman", "man"])
    torch.testing.assert_close(asked_for.pushes, (0.8, -0.8))
    torch.testing.assert_close(found.targets[0], doctor + 0.8 * woman - 0.8 * man)
    wanted = Debiasing("doctor", ("woman", "man"), (0.5, 0.5), (0.75, 0.25))
    torch.testing.assert_close(wanted.pushes, (0.25, -0.25))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_debiasing_adds_in_double_whatever_the_text_encoder_computes_in(toy, kind):
    def rounded(prompts):
        return [replace(each, encodings=each.encodings.to(kind)) for each in toy(prompts)]

    asked_for = Debiasing("doctor", ("woman", "man"), (0.1, 0.9))
    found = debias_constraints(rounded, [asked_for])
    doctor, woman, man = concept_vectors(rounded, ["doctor", "woman", "man"]).double()
    torch.testing.assert_close(
        found.targets[0], doctor + 0.4 * woman - 0.4 * man, rtol=1e-15, atol=1e-14
    )


def test_what_is_carried_over_is_added_in_double_too(toy):
    def rounded(prompts):
        return [replace(each, encodings=each.encodings.half()) for each in toy(prompts)]

    found = time_constraints(rounded, "a cat", "a red cat", False, carry=0.3)
    _, article, red, cat = rounded(["a red cat"])[0].encodings[:4].double()
    torch.testing.assert_close(found.targets[2], cat + 0.3 * (red - article), rtol=0, atol=1e-14)


def test_debiasing_that_has_nothing_to_do_or_makes_no_sense_is_refused(toy):
    with pytest.raises(ValueError, match="shares of 'doctor' are the wanted ones"):
        debias_constraints(toy, [Debiasing("doctor", ("a", "b"), (0.5, 0.5))])
    with pytest.raises(ValueError, match=r"at least two attributes.*found 1"):
        Debiasing("doctor", ("a",), (1.0,))
    with pytest.raises(ValueError, match=r"2 measured shares that add up to 1.*found 0\.5, 0\.6"):
        Debiasing("doctor", ("a", "b"), (0.5, 0.6))
    with pytest.raises(ValueError, match="2 wanted shares"):
        Debiasing("doctor", ("a", "b"), (0.5, 0.5), (1.0,))
    with pytest.raises(ValueError, match="step above 0"):
        Debiasing("doctor", ("a", "b"), (0.5, 0.5), step=0.0)


def test_moderation_makes_a_word_say_as_little_as_an_empty_prompt(toy):
    found = moderation_constraints(toy, ["big cat"])
    assert torch.equal(found.inputs, concept_vectors(toy, ["big cat"]))
    assert torch.equal(found.targets[0], toy.prompt("").encodings[1])


def test_preserving_constraints_hold_a_word_against_an_edit(toy):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).double()
    erase = replacement_constraints(toy, [Erasure("cat", "animal")])
    kept = preserving_constraints(toy, ["dog"], 1e6)
    vector = concept_vectors(toy, ["dog"])[0]
    free = solve(erase, 0.5).factors(weight).dense() @ vector
    held = solve(Constraints.join([erase, kept]), 0.5).factors(weight).dense() @ vector
    assert float(held.norm()) < 1e-4 * float(free.norm())


def test_what_is_preserved_becomes_a_prior_of_all_its_tokens(toy):
    prompts = toy(["a cat", "a dog"])
    rows = torch.cat([prompt.encodings[1:] for prompt in prompts])
    matrix = torch.eye(24, dtype=torch.float64)
    statistics = Covariance(matrix, 10, 1, "words", "toy")
    found = preserve(prompts, 0.5, statistics, 7.0)
    torch.testing.assert_close(found.prior, 0.5 * rows.mT @ rows + 7.0 * matrix)
    assert found.texts == ("a cat", "a dog")
    assert torch.equal(found.sample, rows)
    many = preserve(prompts * 10, 1.0)
    assert 32 < len(many.sample) <= 64
    assert len(preserve([], 1.0, statistics, 1.0).sample) == 0


def test_preserving_nothing_or_with_bad_weights_is_refused(toy):
    with pytest.raises(ValueError, match="prompts or statistics to preserve, found neither"):
        preserve([], 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        preserve(toy(["a cat"]), -1.0)
    small = Covariance(torch.eye(3, dtype=torch.float64), 1, 1, "words", "other")
    with pytest.raises(ValueError, match="3 wide, the prompts' are 24 wide"):
        preserve(toy(["a cat"]), 1.0, small, 1.0)
