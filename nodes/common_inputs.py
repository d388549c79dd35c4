"""Inputs that several nodes have, with the same words."""

from __future__ import annotations

from comfy_api.latest import io


def clip_input() -> io.Clip.Input:
    """The text encoder."""
    return io.Clip.Input("clip", tooltip="The text encoder loaded together with the model.")


def vae_input() -> io.Vae.Input:
    """The VAE."""
    return io.Vae.Input("vae", tooltip="The VAE that belongs to the model.")


def superclass_input() -> io.String.Input:
    """The everyday word."""
    return io.String.Input(
        "superclass",
        default="cat",
        tooltip="The everyday word for this kind of thing, such as cat or coffee mug.",
    )
