"""Key-locked gated rank-one editing of cross-attention: the method, without any host."""

from .closed_form import Constraints, TextEdit, solve
from .concept import Concept, ConceptFileError, load_concept, save_concept
from .concept_inputs import ConceptInputs, merge_inputs
from .covariance import Covariance, CovarianceAccumulator
from .covariance_file import load_covariance, save_covariance
from .edit_model import ModelEdit, edit_model, edit_with, prompt_encoder
from .embedding import EmbeddingReturn, EmbeddingWrapper, merge_embedding_wrappers
from .encoded_prompt import EncodedPrompt
from .erase import Erasure, refinement_constraints, replacement_constraints
from .finetuning import (
    calculate_input_covariance,
    finetune_groups,
    get_finetune_optimizer,
    get_finetune_parameters,
    loss_fn_weighted_by_mask,
)
from .key_lock import locked_outputs
from .low_rank import LowRank, lora_tensors
from .module_files import concept_of, load_modules, save_modules
from .modules import (
    Rank1EditModule,
    make_key_value_proj_rank1_edit_modules_,
    merge_rank1_edit_modules,
)
from .open_clip_wrapper import OpenClipEmbedWrapper
from .preserve import Preserved
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
from .time_edit import time_constraints
from .training import (
    Batch,
    Denoiser,
    Encoded,
    Progress,
    TrainingCallbacks,
    TrainingConfig,
    TrainingResult,
    TrainingState,
    train_concept,
    training_fingerprint,
)
from .training_state import load_state, save_state
from .unified import Debiasing, debias_constraints, moderation_constraints, preserving_constraints

__all__ = [
    "Basis",
    "Batch",
    "Concept",
    "ConceptFileError",
    "ConceptInputs",
    "Constraints",
    "Covariance",
    "CovarianceAccumulator",
    "Debiasing",
    "Denoiser",
    "Direction",
    "EmbeddingReturn",
    "EmbeddingWrapper",
    "Encoded",
    "EncodedPrompt",
    "Erasure",
    "GatedEdit",
    "LowRank",
    "ModelEdit",
    "OpenClipEmbedWrapper",
    "Preserved",
    "Progress",
    "Rank1EditModule",
    "Schedule",
    "TextEdit",
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
