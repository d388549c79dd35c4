"""Photos to learn from, out of a folder."""

from __future__ import annotations

from typing import cast

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..host.pictures.photo_files import (
    LONGEST_SIDE,
    Photo,
    fingerprint,
    load_photos,
    photo_folder,
    photo_folders,
)

# Of a picture on the node, in pixels.
SHOWN = 192


class PerfusionLoadPhotos(io.ComfyNode):
    """The photos of a folder, as a person sees them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerfusionLoadPhotos",
            display_name="Load Photos (Perfusion)",
            category="perfusion/training",
            description="Loads all photos of a folder inside ComfyUI's input folder: turned "
            "upright, of any size and kind, in the order of their names.",
            search_aliases=["perfusion", "load folder", "dataset", "exif"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=photo_folders(),
                    tooltip="The folder with the photos, inside ComfyUI's input folder. Press R on "
                    "the page after making one.",
                ),
                io.Int.Input(
                    "longest_side",
                    default=LONGEST_SIDE,
                    min=0,
                    max=16384,
                    step=64,
                    optional=True,
                    tooltip="Photos with a longer side are made smaller to this many pixels, which "
                    "saves memory and time; training makes them smaller still. 0: as they are.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="The photos as a list, each in its own size. Transparent ones keep "
                    "their transparency, which Train Concept takes as their mask.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="For each photo what the text file of the same name says (cat.txt for "
                    "cat.jpg); empty where there is none.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        """Any folder there is, also one newer than the menu; else which one is missing."""
        if not folder:
            return True  # It comes over a wire, and is looked at when it is there.
        try:
            photo_folder(folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, longest_side: int = LONGEST_SIDE) -> str:
        """Loads again when a file has changed, came or went."""
        return fingerprint(photo_folder(folder))

    @classmethod
    def execute(cls, folder: str, longest_side: int = LONGEST_SIDE) -> io.NodeOutput:
        """IMAGE list, STRING list; small pictures and what was done to each on the node."""
        photos = load_photos(folder, longest_side)
        lines = [photo.line for photo in photos]
        report = "\n".join([f"{len(photos)} {'photo' if len(photos) == 1 else 'photos'}", *lines])
        # They are saved one by one, so they need not be of one size.
        small = cast(Tensor, [_small(photo) for photo in photos])
        shown = ui.PreviewImage(small, cls=cls).as_dict()
        return io.NodeOutput(
            [photo.pixels for photo in photos],
            [photo.caption for photo in photos],
            ui={**shown, **ui.PreviewText(report).as_dict()},
        )


def _small(photo: Photo) -> Tensor:
    """A picture (h, w, C) to show on the node."""
    pixels = photo.pixels.movedim(-1, 1)
    scale = min(1.0, SHOWN / max(pixels.shape[2:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[2:]]
    return torch.nn.functional.interpolate(pixels, size, mode="area")[0].movedim(0, -1)
