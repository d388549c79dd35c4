"""Perfusion for ComfyUI: key-locked, gated rank-one editing of cross-attention."""

from .host.concept_files import register_folder
from .nodes import PerfusionExtension

WEB_DIRECTORY = "./web"

register_folder()


async def comfy_entrypoint() -> PerfusionExtension:
    """What ComfyUI calls to learn the pack's nodes."""
    return PerfusionExtension()
