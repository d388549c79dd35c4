"""TIME: change what a model assumes where a prompt leaves it open (arXiv 2303.08084, section 4).

"A pack of roses" shall mean what "a pack of blue roses" means: every token of the source gets the
keys and values that its counterpart has in the destination.
"""

from __future__ import annotations

from .closed_form import Constraints
from .encoded_prompt import EncodedPrompt, Encoder, check_prompt, match_in_order

RIDGE = 0.1
"""lambda of the paper."""
AUGMENTATIONS = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
"""The paper's prompts around source and destination."""


def time_constraints(
    encode: Encoder, source: str, destination: str, augment: bool = True
) -> Constraints:
    """The constraints of one edit; solve them with ``RIDGE`` and no prior for the paper's edit.

    Raises:
        ValueError: for an empty or equal prompt, and for a source word that the destination lacks.
    """
    source = check_prompt("source prompt", source)
    destination = check_prompt("destination prompt", destination)
    templates = AUGMENTATIONS if augment else AUGMENTATIONS[:1]
    prompts = [
        template.replace("{}", text) for template in templates for text in (source, destination)
    ]
    encoded = encode(prompts)
    if encoded[0].tokens == encoded[1].tokens:
        raise ValueError(
            f"source {source!r} and destination {destination!r} are the same words: there is "
            "nothing to edit; add to the destination what the model shall assume"
        )
    pairs = zip(encoded[::2], encoded[1::2], strict=True)
    return Constraints.join([_matched(before, after) for before, after in pairs])


def _matched(source: EncodedPrompt, destination: EncodedPrompt) -> Constraints:
    return Constraints(source.encodings, destination.encodings[match_in_order(source, destination)])
