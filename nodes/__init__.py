"""What a user drags: the schemas of the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .concepts import (
    PerfusionApplyConcepts,
    PerfusionConceptInfo,
    PerfusionLoadConcept,
    PerfusionSaveConcept,
    PerfusionSetGate,
)
from .debias import PerfusionDebias
from .demo import PerfusionDemoImages, PerfusionDemoModel
from .edit_assumption import PerfusionEditAssumption
from .erase_concepts import PerfusionEraseConcepts
from .masks import PerfusionAutoMask
from .photos import PerfusionLoadPhotos
from .preserve import PerfusionPreserve
from .save_edit import PerfusionSaveEdit
from .schedule import PerfusionScheduleGate
from .training import PerfusionCovariance, PerfusionTrainConcept
from .training_options import PerfusionTrainingOptions
from .training_runs import PerfusionTrainingRuns

NODES: tuple[type[io.ComfyNode], ...] = (
    PerfusionApplyConcepts,
    PerfusionLoadConcept,
    PerfusionSetGate,
    PerfusionScheduleGate,
    PerfusionSaveConcept,
    PerfusionConceptInfo,
    PerfusionLoadPhotos,
    PerfusionTrainConcept,
    PerfusionTrainingOptions,
    PerfusionTrainingRuns,
    PerfusionAutoMask,
    PerfusionCovariance,
    PerfusionEditAssumption,
    PerfusionEraseConcepts,
    PerfusionDebias,
    PerfusionPreserve,
    PerfusionSaveEdit,
    PerfusionDemoModel,
    PerfusionDemoImages,
)


class PerfusionExtension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes, in the order in which a user meets them."""
        return list(NODES)
