"""The sentences a concept is trained in. Each holds its one place for the concept as ``{}``."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Raise ValueError unless every template has exactly one ``{}`` and no other brace."""
    if not templates:
        raise ValueError("expected at least one prompt template, found none")
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise ValueError(
                f"expected a prompt template with exactly one {{}} for the concept, "
                f"found {template!r}"
            )


def check_captions(captions: Sequence[str]) -> None:
    """Raise ValueError unless every caption has exactly one ``{}`` and no other brace."""
    for number, caption in enumerate(captions, 1):
        if caption.count("{}") != 1 or caption.count("{") != 1 or caption.count("}") != 1:
            raise ValueError(
                f"expected one {{}} in caption {number}, where the concept stands, and no other "
                f"brace, found {caption!r}"
            )


def captions_for(captions: Sequence[str], placeholder: str) -> tuple[str, ...]:
    """A user's captions, each with the placeholder (or ``{}``) in it, with ``{}`` in its place.

    Raises ValueError naming a caption without the placeholder, or with it more than once.
    """
    found = []
    for number, caption in enumerate(captions, 1):
        text = " ".join(caption.split()).replace(placeholder, "{}")
        if text.count("{}") != 1:
            raise ValueError(
                f"caption {number}: expected the placeholder {placeholder} once, found it "
                f"{text.count('{}')} times in {caption!r}; write it where the thing is named"
            )
        found.append(text)
    check_captions(found)
    return tuple(found)


def fill(template: str, word: str) -> str:
    """Put ``word`` into the template's one place."""
    return template.replace("{}", word)
