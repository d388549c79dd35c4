"""Which names, placeholders and superclasses are accepted, from a user or from a file."""

from __future__ import annotations

import re
import unicodedata

TEXT_LIMIT = 128
# Separators of paths and of prompt syntax, so that a placeholder is always one whole word.
FORBIDDEN_IN_WORDS = "/\\:(){}[],;|\"'*?`"
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", re.ASCII)


def word_pattern(word: str) -> str:
    """A regular expression for a word where it stands by itself, not inside of another."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def check_identifier(key: str, text: str) -> None:
    """Check that ``text`` is a plain dotted name (module path, family, encoder).

    Raises:
        ValueError: naming ``key`` when it is not.
    """
    if not _IDENTIFIER.fullmatch(text) or ".." in text:
        raise ValueError(
            f"{key}: expected a name of letters, digits, '_', '-' and single '.', "
            f"found {text[:TEXT_LIMIT]!r}"
        )


def check_word(key: str, text: str) -> None:
    """Check that ``text`` is one visible word that no prompt syntax takes apart.

    Raises:
        ValueError: naming ``key`` when it is not.
    """
    if any(character.isspace() for character in text):
        raise ValueError(f"{key}: expected one word without spaces, found {text[:TEXT_LIMIT]!r}")
    check_phrase(key, text)


def check_phrase(key: str, text: str) -> None:
    """Check that ``text`` is one or more visible words, 1 to 128 characters.

    Raises:
        ValueError: naming ``key`` when it is not.
    """
    if not 0 < len(text) <= TEXT_LIMIT or text != text.strip() or not text.strip("."):
        raise ValueError(
            f"{key}: expected 1 to {TEXT_LIMIT} characters without outer spaces, "
            f"found {text[:TEXT_LIMIT]!r}"
        )
    for character in text:
        # Category C: control, format, surrogate, private use, unassigned. Z*: odd separators.
        category = unicodedata.category(character)
        hidden = category[0] in "CZ" and character != " "
        if hidden or character in FORBIDDEN_IN_WORDS:
            raise ValueError(
                f"{key}: expected visible characters other than {FORBIDDEN_IN_WORDS}, "
                f"found {character!r} in {text!r}"
            )
