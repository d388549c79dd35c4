"""Key-locked gated rank-one editing of cross-attention: the method, without any host.

What research code uses is here (docs/research.md); everything else is imported from the room it is
in, such as `perfusion.closed_form.solver`.
"""

from .concept.concept import Concept
from .concept.concept_file import load_concept, save_concept
from .files.safe_file import FileFormatError
from .gated.covariance import Covariance
from .gated.covariance_file import load_covariance, save_covariance
from .gated.gate import Gate
from .gated.gate_schedule import GateSchedule
from .gated.rank_one import Direction, combine, edit_projection, gated_inputs, project
from .modules.concept_inputs import ConceptInputs
from .modules.embedding import EmbeddingWrapper, merge_embedding_wrappers
from .modules.files import load_modules, save_modules
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
from .training.config import TrainingConfig
from .training.denoiser import Denoiser
from .training.run import train_concept

__all__ = [
    "Concept",
    "ConceptInputs",
    "Covariance",
    "Denoiser",
    "Direction",
    "EmbeddingWrapper",
    "FileFormatError",
    "Gate",
    "GateSchedule",
    "OpenClipEmbedWrapper",
    "Rank1EditModule",
    "TrainingConfig",
    "calculate_input_covariance",
    "combine",
    "edit_projection",
    "finetune_groups",
    "gated_inputs",
    "get_finetune_optimizer",
    "get_finetune_parameters",
    "load_concept",
    "load_covariance",
    "load_modules",
    "loss_fn_weighted_by_mask",
    "make_key_value_proj_rank1_edit_modules_",
    "merge_embedding_wrappers",
    "merge_rank1_edit_modules",
    "project",
    "save_concept",
    "save_covariance",
    "save_modules",
    "train_concept",
]
