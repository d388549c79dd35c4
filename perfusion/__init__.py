"""Key-locked gated rank-one editing of cross-attention: the method, without any host."""

from .concept import Concept, ConceptFileError, load_concept, save_concept
from .covariance import Covariance, CovarianceAccumulator
from .key_lock import locked_outputs
from .rank_one import (
    Basis,
    Direction,
    GatedEdit,
    active_directions,
    combine,
    edit_projection,
    gated_inputs,
    project,
    similarities,
)
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
    "Covariance",
    "CovarianceAccumulator",
    "Denoiser",
    "Direction",
    "Encoded",
    "GatedEdit",
    "TrainingConfig",
    "TrainingResult",
    "active_directions",
    "combine",
    "edit_projection",
    "gated_inputs",
    "load_concept",
    "locked_outputs",
    "project",
    "save_concept",
    "similarities",
    "train_concept",
]
