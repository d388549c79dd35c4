"""The sentences a concept is trained in. Each holds its one place for the concept as ``{}``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .words import word_pattern

TEMPLATES: tuple[str, ...] = (
    "a {}",
    "a photo of a {}",
    "a photo of the {}",
    "a photo of my {}",
    "a photo of one {}",
    "a picture of a {}",
    "a picture of the {}",
    "an image of a {}",
    "an image of the {}",
    "a photograph of a {}",
    "a nice photo of a {}",
    "a photo of a nice {}",
    "a good photo of the {}",
    "a photo of a small {}",
    "a photo of a large {}",
    "a close-up photo of the {}",
)


def check_templates(templates: Sequence[str]) -> None:
    """Check that there are templates, each with one place for the concept.

    Raises:
        ValueError: for none, and naming the first one without exactly one ``{}``.
    """
    if not templates:
        raise ValueError("expected at least one prompt template, found none")
    check_places("template", templates)


def check_places(kind: str, sentences: Sequence[str]) -> None:
    """Check that every sentence has one place for the concept.

    Raises:
        ValueError: naming the first one without exactly one ``{}``, or with another brace.
    """
    for number, sentence in enumerate(sentences, 1):
        if [sentence.count(found) for found in ("{}", "{", "}")] != [1, 1, 1]:
            raise ValueError(
                f"expected exactly one {{}} in {kind} {number}, where the concept stands, and no "
                f"other brace, found {sentence!r}"
            )


def captions_for(captions: Sequence[str], placeholder: str) -> tuple[str, ...]:
    """A user's captions, each with the placeholder (or ``{}``) in it, with ``{}`` in its place.

    The placeholder is found as a whole word, whatever its case, as prompts are read.

    Raises:
        ValueError: naming a caption without the placeholder, or with it more than once.
    """
    pattern = re.compile(word_pattern(placeholder), re.IGNORECASE)
    found = []
    for number, caption in enumerate(captions, 1):
        text = pattern.sub("{}", " ".join(caption.split()))
        if text.count("{}") != 1:
            raise ValueError(
                f"caption {number}: expected the placeholder {placeholder} once, found it "
                f"{text.count('{}')} times in {caption!r}; write it where the thing is named"
            )
        found.append(text)
    check_places("caption", found)
    return tuple(found)


def fill(template: str, word: str) -> str:
    """Put ``word`` into the template's one place."""
    return template.replace("{}", word)
