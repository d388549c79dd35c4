"""Make the concepts that templates 2 to 5 use: ``python -m demo.train_concepts``."""

import logging

from inprocess import load_pack

load_pack()

from comfyui_perfusion.host.files.concept_files import SHIPPED  # noqa: E402
from comfyui_perfusion.perfusion import TrainingConfig, save_concept  # noqa: E402

from .measure import (  # noqa: E402
    LEARNING_RATE,
    PLACEHOLDER,
    SECOND,
    SECOND_PLACEHOLDER,
    SUBJECT,
    World,
)
from .things import superclass_of  # noqa: E402

log = logging.getLogger("demo.train")
STEPS = 150


def main() -> None:
    """Train each concept apart, with the settings of template 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    SHIPPED.mkdir(exist_ok=True)
    world = World()
    for subject, placeholder, mode, name in (
        (SUBJECT, PLACEHOLDER, "twin_lock", "bo"),
        (SECOND, SECOND_PLACEHOLDER, "twin_lock", "olli"),
        (SUBJECT, PLACEHOLDER, "perfusion", "bo_local_lock"),
    ):
        config = TrainingConfig(
            placeholder,
            superclass_of(subject),
            steps=STEPS,
            batch_size=4,
            learning_rate=LEARNING_RATE,
            schedule="cosine",
            mode=mode,
        )
        path = SHIPPED / f"{name}.safetensors"
        save_concept(world.train(subject, config), path)
        log.info("%s: %d bytes", path, path.stat().st_size)


if __name__ == "__main__":
    main()
