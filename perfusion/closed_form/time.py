"""TIME: change what a model assumes where a prompt leaves it open (arXiv 2303.08084, section 4).

"A pack of roses" shall mean what "a pack of blue roses" means: every token of the source gets the
keys and values that its counterpart has in the destination.

That rests on a text encoder that lets later words know of earlier ones: the added word itself has
no counterpart, its meaning must have reached the words behind it. Where it does not (small
encoders, colours), ``carry`` (ours) gives the neighbouring word a part of what the added word's own
encoding has beyond that of the word in front of it, as UCE adds attributes to a concept.
"""

from __future__ import annotations

import torch

from ..text.encoded_prompt import EncodedPrompt, EncodePrompts, check_prompt
from ..text.prompts import fill
from .constraints import Constraints
from .matching import match_in_order

RIDGE = 0.1
"""lambda of the paper."""
AUGMENTATIONS = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
"""The paper's prompts around source and destination."""


def time_constraints(
    encode: EncodePrompts,
    source: str,
    destination: str,
    augment: bool = True,
    carry: float = 0.0,
    with_padding: bool = True,
) -> Constraints:
    """The constraints of one edit; solve them with ``RIDGE`` and no prior for the paper's edit.

    Args:
        encode: gives the model's own encodings.
        source: the prompt that leaves something open.
        destination: the source with words added; an article may change ("a bag", "an old bag").
        augment: ask in all of the paper's prompts instead of one.
        carry: 0 in the paper; how much of an added word's encoding the word behind it takes on, or
            the word before it at the end of the prompt.
        with_padding: True in the paper; match end and padding too, not only the words.

    Raises:
        ValueError: for an empty or equal prompt, for source words that the destination lacks, and
            where all tokens of the source have their destination's encodings already.
    """
    source = check_prompt("source prompt", source)
    destination = check_prompt("destination prompt", destination)
    templates = AUGMENTATIONS if augment else AUGMENTATIONS[:1]
    prompts = [fill(template, text) for template in templates for text in (source, destination)]
    encoded = encode(prompts)
    if encoded[0].tokens == encoded[1].tokens:
        raise ValueError(
            f"source {source!r} and destination {destination!r} are the same words: there is "
            "nothing to edit; add to the destination what the model shall assume"
        )
    pairs = zip(encoded[::2], encoded[1::2], strict=True)
    asked = Constraints.join([_matched(*pair, carry, with_padding) for pair in pairs])
    if not bool(asked.moved.any()):
        raise ValueError(
            f"every word of {source!r} has the encoding that it has in {destination!r} already: "
            "the added words stand behind all others, and the text encoder reads from left to "
            "right. Put them in front of a word, set carry above 0, or match the padding too"
        )
    return asked


def _matched(
    source: EncodedPrompt, destination: EncodedPrompt, carry: float, with_padding: bool
) -> Constraints:
    matched = match_in_order(source, destination)
    # In fp64, so that a sum of encodings is not rounded to the text encoder's own precision.
    encodings = destination.encodings.to(torch.float64)
    targets = encodings[matched]
    if carry:
        for at, position in _added(source, destination, matched):
            before = _before(destination, matched, position)
            targets[at] += carry * (encodings[position] - encodings[before])
    count = None if with_padding else source.end
    return Constraints(source.encodings[:count], targets[:count])


def _before(destination: EncodedPrompt, matched: list[int], position: int) -> int:
    # The last matched token in front of an added word. Where nothing stands in front of it, not
    # even a start token, the first one behind it.
    return max((at for at in matched if at < position), default=min(matched))


def _added(
    source: EncodedPrompt, destination: EncodedPrompt, matched: list[int]
) -> list[tuple[int, int]]:
    # For every added word of the destination, the source position that takes it on.
    words = matched[source.first : source.end]
    found = []
    for position in range(destination.first, destination.end):
        if position not in words:
            behind = sum(word < position for word in words)
            found.append((source.first + min(behind, len(words) - 1), position))
    return found
