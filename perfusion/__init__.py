"""Key-locked gated rank-one editing of cross-attention: the method, without any host."""

from .closed_form import Constraints, TextEdit, solve
from .concept import Concept, ConceptFileError, load_concept, save_concept
from .covariance import Covariance, CovarianceAccumulator
from .key_lock import locked_outputs
from .low_rank import LowRank, lora_tensors
from .rank_one import (
    Basis,
    Direction,
    GatedEdit,
    active_directions,
    combine,
    edit_projection,
    edited_inputs,
    gated_inputs,
    open_gates,
    project,
    similarities,
)
from .schedule import Schedule
from .training import (
    Batch,
    Denoiser,
    Encoded,
    TrainingConfig,
    TrainingResult,
    train_concept,
)

__all__ = [
    "Basis",
    "Batch",
    "Concept",
    "ConceptFileError",
    "Constraints",
    "Covariance",
    "CovarianceAccumulator",
    "Denoiser",
    "Direction",
    "Encoded",
    "GatedEdit",
    "Schedule",
    "LowRank",
    "TextEdit",
    "TrainingConfig",
    "TrainingResult",
    "active_directions",
    "combine",
    "edit_projection",
    "edited_inputs",
    "gated_inputs",
    "load_concept",
    "locked_outputs",
    "lora_tensors",
    "open_gates",
    "project",
    "save_concept",
    "similarities",
    "solve",
    "train_concept",
]
