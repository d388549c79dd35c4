"""Perfusion for ComfyUI: key-locked, gated rank-one editing of cross-attention."""

from .demo.model.family import SMALL_WORLD
from .host.files import concept_files
from .host.files.concept_upload import register_route
from .host.interface.hints import register_hints
from .host.models.families import register_family
from .host.text import covariance
from .nodes import PerfusionExtension

WEB_DIRECTORY = "./web"

register_family(SMALL_WORLD)
concept_files.register_folder()
covariance.register_folder()
register_route()
register_hints()


async def comfy_entrypoint() -> PerfusionExtension:
    """What ComfyUI calls to learn the pack's nodes."""
    return PerfusionExtension()
