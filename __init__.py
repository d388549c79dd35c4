"""Perfusion for ComfyUI: key-locked, gated rank-one editing of cross-attention."""

from .host.files import concept_files
from .host.text import covariance
from .nodes import PerfusionExtension

WEB_DIRECTORY = "./web"

concept_files.register_folder()
covariance.register_folder()


async def comfy_entrypoint() -> PerfusionExtension:
    """What ComfyUI calls to learn the pack's nodes."""
    return PerfusionExtension()
