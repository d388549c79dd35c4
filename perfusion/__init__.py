"""Key-locked gated rank-one editing of cross-attention: the method, without any host."""

from .closed_form.edit_model import ModelEdit, edit_model, edit_with, prompt_encoder
from .closed_form.low_rank import LowRank, lora_tensors
from .closed_form.mace import Erasure, refinement_constraints, replacement_constraints
from .closed_form.preserve import Preserved
from .closed_form.solver import Constraints, SolvedEdit, solve
from .closed_form.time import time_constraints
from .closed_form.uce import (
    Debiasing,
    debias_constraints,
    moderation_constraints,
    preserving_constraints,
)
from .concept.concept import Concept
from .concept.concept_file import load_concept, save_concept
from .files.safe_file import FileFormatError
from .gated.covariance import Covariance, CovarianceAccumulator
from .gated.covariance_file import load_covariance, save_covariance
from .gated.gate_schedule import GateSchedule
from .gated.key_lock import locked_outputs
from .gated.rank_one import (
    Basis,
    Direction,
    GatedProjections,
    active_directions,
    combine,
    edit_projection,
    edited_inputs,
    gated_inputs,
    open_gates,
    project,
    similarities,
)
from .modules.concept_inputs import ConceptInputs, merge_inputs
from .modules.embedding import EmbeddingReturn, EmbeddingWrapper, merge_embedding_wrappers
from .modules.files import concept_of, load_modules, save_modules
from .modules.finetuning import (
    calculate_input_covariance,
    finetune_groups,
    get_finetune_optimizer,
    get_finetune_parameters,
    loss_fn_weighted_by_mask,
)
from .modules.open_clip import OpenClipEmbedWrapper
from .modules.projections import Rank1EditModule
from .modules.wrapping import make_key_value_proj_rank1_edit_modules_, merge_rank1_edit_modules
from .text.encoded_prompt import EncodedPrompt
from .training.run import (
    Batch,
    Conditioning,
    Denoiser,
    Progress,
    TrainingCallbacks,
    TrainingConfig,
    TrainingResult,
    TrainingState,
    train_concept,
    training_fingerprint,
)
from .training.state import load_state, save_state

__all__ = [
    "Basis",
    "Batch",
    "Concept",
    "ConceptInputs",
    "Conditioning",
    "Constraints",
    "Covariance",
    "CovarianceAccumulator",
    "Debiasing",
    "Denoiser",
    "Direction",
    "EmbeddingReturn",
    "EmbeddingWrapper",
    "EncodedPrompt",
    "Erasure",
    "FileFormatError",
    "GateSchedule",
    "GatedProjections",
    "LowRank",
    "ModelEdit",
    "OpenClipEmbedWrapper",
    "Preserved",
    "Progress",
    "Rank1EditModule",
    "SolvedEdit",
    "TrainingCallbacks",
    "TrainingConfig",
    "TrainingResult",
    "TrainingState",
    "active_directions",
    "calculate_input_covariance",
    "combine",
    "concept_of",
    "debias_constraints",
    "edit_model",
    "edit_projection",
    "edit_with",
    "edited_inputs",
    "finetune_groups",
    "gated_inputs",
    "get_finetune_optimizer",
    "get_finetune_parameters",
    "load_concept",
    "load_covariance",
    "load_modules",
    "load_state",
    "locked_outputs",
    "lora_tensors",
    "loss_fn_weighted_by_mask",
    "make_key_value_proj_rank1_edit_modules_",
    "merge_embedding_wrappers",
    "merge_inputs",
    "merge_rank1_edit_modules",
    "moderation_constraints",
    "open_gates",
    "preserving_constraints",
    "project",
    "prompt_encoder",
    "refinement_constraints",
    "replacement_constraints",
    "save_concept",
    "save_covariance",
    "save_modules",
    "save_state",
    "similarities",
    "solve",
    "time_constraints",
    "train_concept",
    "training_fingerprint",
]
