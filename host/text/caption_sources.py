"""Where captions come from: the built-in grammar, a text, a file; each with a name and a count."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths
from comfy.sd import CLIP

from ..models.families import family_of_clip
from .captions import COUNT, GRAMMAR, everyday_captions

# Longer lines are taken in pieces: a file may be one line of many gigabytes.
_LONGEST = 2000


@dataclass(frozen=True)
class CaptionSource:
    """Captions that can be read any number of times without ever being held together.

    `key` names them among what is kept on disk; `count` is how many there are.
    """

    key: str
    count: int
    read: Callable[[], Iterable[str]]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(
                "expected captions to measure the covariance on, found none; write one a line"
            )


def built_in(count: int = COUNT) -> CaptionSource:
    """The first captions of the built-in grammar."""
    return CaptionSource(f"{GRAMMAR}, {count}", count, lambda: everyday_captions(count))


def known_to(clip: CLIP, count: int = COUNT) -> CaptionSource:
    """Captions of words that a text encoder knows: its family's own, or the built-in ones."""
    words = family_of_clip(clip).words
    if words is None:
        return built_in(count)
    return of_list(words.key, words.captions(min(count, words.most)))


def sentences_known_to(clip: CLIP) -> tuple[str, ...]:
    """Sentences of words that a text encoder knows; none where it knows everyday language."""
    words = family_of_clip(clip).words
    return () if words is None else words.sentences


def of_text(text: str) -> CaptionSource:
    """The lines of a text.

    Raises:
        ValueError: when none has a word in it.
    """
    return _hashed(lambda: _captions(text.splitlines()))


def of_list(key: str, captions: list[str]) -> CaptionSource:
    """Captions at hand, under a name of the caller's."""
    return CaptionSource(f"{key}, {len(captions)}", len(captions), lambda: captions)


def of_file(name: str) -> CaptionSource:
    """The lines of a text file (UTF-8) in ComfyUI's input folder, of any size.

    Raises:
        FileNotFoundError: when it is not in that folder.
        ValueError: when it holds no caption.
    """
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise FileNotFoundError(
            f"there is no text file {name!r} in {folder}; put it there, one caption a line"
        )
    return _hashed(lambda: _captions(_lines(path)))


def _hashed(read: Callable[[], Iterator[str]]) -> CaptionSource:
    content, count = hashlib.sha256(), 0
    for caption in read():
        content.update(caption.encode() + b"\n")
        count += 1
    return CaptionSource(f"text {content.hexdigest()}", count, read)


def _captions(lines: Iterable[str]) -> Iterator[str]:
    stripped = (line.strip() for line in lines)
    return (line for line in stripped if line)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        while line := file.readline(_LONGEST):
            yield line
