"""The small world for its visitors: photographs of personal things, and the weights."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from .render import render
from .things import SUBJECTS, Look, personal_specs

WEIGHTS = Path(__file__).parent / "weights"


def personal_pictures(subject: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Photographs of a personal thing: images (count, 64, 64, 3), masks (count, 64, 64), 0 to 1.

    Raises ValueError for a subject that is not one of ``SUBJECTS`` and for a count below 1.
    """
    if subject not in SUBJECTS:
        raise ValueError(
            f"no personal thing is called {subject!r}; there are {', '.join(SUBJECTS)}"
        )
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    return photographs(subject, count, seed)


def photographs(thing: str | Look, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same of any thing, a look that is none of ``SUBJECTS`` too."""
    pictures, masks = render(personal_specs(thing, count, seed))
    return pictures.permute(0, 2, 3, 1).float() / 255, masks[:, 0].contiguous()


def world_weights(folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """The small world's weights, as ``demo.model.small_model.load_small_model`` takes them.

    Raises FileNotFoundError when the pack was installed without them.
    """
    path = folder / "small_world.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; reinstall the pack, or make it with `python -m demo.train`"
        )
    return load_file(path)
