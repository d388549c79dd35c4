"""Where the concept stands in a sentence, as its author wrote it."""

from __future__ import annotations

import pytest

from perfusion.text.encoded_prompt import starts_of
from perfusion.text.prompts import captions_for, check_places, check_templates, fill


@pytest.mark.parametrize(
    ("caption", "placeholder", "expected"),
    [
        ("a cat of the category cats", "cat", "a {} of the category cats"),
        ("a Cat, asleep", "cat", "a {}, asleep"),
        ("a <bo>, and <bobo>", "<bo>", "a {}, and <bobo>"),
        ("my<bo>house", "<bo>", "my{}house"),
        ("a {} of the category", "cat", "a {} of the category"),
        ("  two   spaces and\na <bo>\t", "<bo>", "two spaces and a {}"),
        ("a $5.0 coin, 15.00", "$5.0", "a {} coin, 15.00"),
    ],
)
def test_the_placeholder_is_a_whole_word_of_the_caption(caption, placeholder, expected):
    assert captions_for([caption], placeholder) == (expected,)


@pytest.mark.parametrize(
    ("caption", "count"),
    [("the category of cats", 0), ("a cat and a Cat", 2), ("a {} and a cat", 2)],
)
def test_a_caption_without_the_placeholder_or_with_several_is_named(caption, count):
    with pytest.raises(ValueError, match=f"caption 2: .*placeholder cat once, found it {count} "):
        captions_for(["one cat", caption], "cat")


def test_templates_and_captions_are_checked_by_one_rule_and_named_by_number():
    check_templates(["a {}", "the {}"])
    check_places("caption", [])
    with pytest.raises(ValueError, match="at least one prompt template, found none"):
        check_templates([])
    for broken in ("a cat", "{} and {}", "a {0} {}", "a {} }"):
        with pytest.raises(ValueError, match=r"exactly one \{\} in template 2"):
            check_templates(["a {}", broken])
        with pytest.raises(ValueError, match=r"exactly one \{\} in caption 1"):
            check_places("caption", [broken])
    assert fill("a photo of a {}", "cat") == "a photo of a cat"


def test_every_place_of_a_phrase_in_a_row_is_found():
    assert starts_of([1, 2, 1, 2, 1], [1, 2]) == [0, 2]
    assert starts_of((1, 1, 1), [1, 1]) == [0, 1]
    assert starts_of([1], [1, 2]) == []
    assert starts_of([None, "a"], ("a",)) == [1]
