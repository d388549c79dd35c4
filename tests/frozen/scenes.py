"""What is frozen of pictures and trainings: small models with random weights, used in many ways.

Only nodes and what tests share are used here, so that the same lines run in any version.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from comfyui_perfusion.nodes.concepts import PerfusionApplyConcepts
from comfyui_perfusion.nodes.schedule import PerfusionScheduleGate
from comfyui_perfusion.nodes.training import PerfusionTrainConcept

from tests.host.small_training import TrainingOptions, measure_covariance

STEPS = 3
# name -> family, concept files, key lock, whether the first concept follows a schedule.
SCENES = {
    "no concept": ("sd1_light", (), "local", False),
    "one, local": ("sd1_light", ("locked",), "local", False),
    "one, global": ("sd1_light", ("locked",), "global", False),
    "trained keys, local": ("sd1_light", ("trained",), "local", False),
    "two, local": ("sd1_light", ("locked", "trained"), "local", False),
    "two, global": ("sd1_light", ("locked", "second"), "global", False),
    "one scheduled, local": ("sd1_light", ("locked",), "local", True),
    "two, one scheduled, local": ("sd1_light", ("locked", "trained"), "local", True),
    "one scheduled, global": ("sd1_light", ("locked",), "global", True),
    "sdxl, no concept": ("sdxl_light", (), "local", False),
    "sdxl, local": ("sdxl_light", ("sdxl",), "local", False),
    "sdxl, global": ("sdxl_light", ("sdxl",), "global", False),
}
PLACEHOLDERS = {"locked": "<a>", "trained": "<b>", "sdxl": "<c>", "second": "<d>"}
# The first 80 % of the sampling, a gate that moves, two thirds of the blocks.
SCHEDULE = (0.0, 0.8, 0.3, 0.6, 0.2, 0.3, "middle, up")


def latents(worlds, concepts, name):
    """The latents of a scene; `concepts` are those of the files, by name."""
    family, used, lock, scheduled = SCENES[name]
    chosen = [concepts[file] for file in used]
    if scheduled:
        chosen[0] = PerfusionScheduleGate.execute(chosen[0], *SCHEDULE).args[0]
    model, clip = worlds.model(family), worlds.clip(family)
    if chosen:
        sockets = {f"concept{number}": concept for number, concept in enumerate(chosen)}
        model, clip = PerfusionApplyConcepts.execute(model, clip, sockets, lock).args
    words = [PLACEHOLDERS[file] for file in used] or ["cat"]
    return worlds.sample(model, clip, f"a photo of {' and '.join(words)} on the beach", STEPS)


class Training:
    """A short training of the smallest model of a published family."""

    STEPS = 4

    def __init__(self, worlds):
        random = torch.Generator().manual_seed(0)
        self.images = torch.rand(2, 64, 64, 3, generator=random)
        model, clip, vae = worlds.model("small"), worlds.clip("sd1"), worlds.vae()
        # The text encoder's name is what counts here; no matrix of 4.7 MB need be kept.
        measured = measure_covariance(clip, ["a cat", "a photo of a cat"])
        self.covariance = replace(measured, matrix=torch.eye(768, dtype=torch.float64))
        self.models = model, clip, vae

    def run(self, steps=STEPS):
        """What the node returns; its inputs come as ComfyUI passes them, as lists."""
        options = TrainingOptions(
            schedule="constant",
            templates=("a {}", "a photo of a {}"),
            sample_every=0,
            rate_unit="absolute",
        )
        settings = {
            **dict(zip(("model", "clip", "vae"), self.models, strict=True)),
            **{"images": self.images, "covariance": self.covariance, "options": options},
            **{"placeholder": "<a>", "superclass": "cat", "steps": steps, "batch_size": 2},
            **{"learning_rate": 0.1, "embedding_learning_rate": 0.006, "seed": 0},
            "key_lock": "local",
        }
        with torch.inference_mode():
            return PerfusionTrainConcept.execute(**{k: [v] for k, v in settings.items()}).args
