"""What is frozen of pictures: concepts in small models, sampled in every way they can be applied.

Only nodes and the fixtures `worlds` are used here, so that the same lines run in any version.
"""

from __future__ import annotations

from comfyui_perfusion.nodes.concepts import PerfusionApplyConcepts
from comfyui_perfusion.nodes.schedule import PerfusionScheduleGate

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
