"""Photos as files: found in a folder, turned upright, and read whatever kind they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..interface.messages import tell, warn

KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What phones write besides, and what lies about in folders of pictures without being one.
OTHER_PICTURES = (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".gif")
LONGEST_SIDE = 2048
_DEEPEST = 65535  # white in a grey picture of 16 bits
_TURNED = range(2, 9)  # EXIF orientations other than upright


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture that was read.

    Attributes:
        name: its file's.
        pixels: (1, H, W, 3) in 0..1, or 4 where it is transparent somewhere.
        caption: what a text file of the same name says, or nothing.
        line: what was done to it, for people.
    """

    name: str
    pixels: Tensor
    caption: str
    line: str


def photo_folders() -> list[str]:
    """The folders below ComfyUI's input folder, as a menu shows them."""
    return folder_paths.get_input_subfolders()


def photo_folder(name: str) -> Path:
    """The folder of a name from `photo_folders`.

    Raises:
        ValueError: when there is none inside the input folder.
    """
    root = Path(folder_paths.get_input_directory())
    path = root / name
    inside = path.resolve().is_relative_to(root.resolve())
    if not name.strip() or not inside or not path.is_dir():
        raise ValueError(
            f"folder: expected a folder of photos inside {root}, found {name!r}; make one there, "
            "put the photos into it, press R on the page and choose it"
        )
    return path


def photo_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The photos of a folder in the order a person counts in, and what is left out of it.

    Raises:
        ValueError: when no photo is in it.
    """
    files = sorted((file for file in folder.iterdir() if file.is_file()), key=_counting)
    photos = [file for file in files if file.suffix.lower() in KINDS]
    others = [file.name for file in files if file.suffix.lower() in OTHER_PICTURES]
    if not photos:
        found = f"{', '.join(others)}, which cannot be read; save them as JPEG or PNG"
        raise ValueError(
            f"expected photos ({' '.join(KINDS)}) in {folder}, found "
            f"{found if others else 'none; put 4 to 6 photos of the thing into it'}"
        )
    return photos, others


def fingerprint(folder: Path) -> str:
    """Changes whenever a file in the folder does."""
    status = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return " ".join(f"{name}:{found.st_mtime_ns}:{found.st_size}" for name, found in status)


def load_photos(name: str, longest_side: int = LONGEST_SIDE) -> list[Photo]:
    """The photos of a folder from `photo_folders`, shown while they are read; interruptible.

    Raises:
        ValueError: for a folder that is not there or holds no photo, and for one that is damaged.
    """
    files, others = photo_files(photo_folder(name))
    if others:
        warn(
            f"left out of {name}, since ComfyUI cannot read them: {', '.join(others)}; save them "
            "as JPEG or PNG"
        )
    progress = comfy.utils.ProgressBar(len(files))

    def before_each(at: int, count: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(at, count)
        tell(f"reading photo {at + 1} of {count}")

    return read_photos(files, longest_side, before_each)


def read_photos(
    files: list[Path],
    longest_side: int = LONGEST_SIDE,
    before_each: Callable[[int, int], None] | None = None,
) -> list[Photo]:
    """Read photos one by one.

    Args:
        files: from `photo_files`.
        longest_side: larger ones are made smaller to this many pixels; 0 for no limit.
        before_each: called with a photo's number from 0 and their count before it is read.

    Raises:
        ValueError: naming the file that is damaged or too large.
    """
    photos = []
    for at, file in enumerate(files):
        if before_each is not None:
            before_each(at, len(files))
        photos.append(read_photo(file, longest_side))
    return photos


def read_photo(file: Path, longest_side: int = LONGEST_SIDE) -> Photo:
    """Read one photo the way a person sees it: upright, in colour, in the whole range of its greys.

    Raises:
        ValueError: when it is damaged or too large.
    """
    try:
        with Image.open(file) as picture:
            size, turned = picture.size, picture.getexif().get(0x0112) in _TURNED
            if longest_side:
                # Lets a JPEG be decoded at a half, a quarter or an eighth where that is enough.
                picture.draft(None, (longest_side, longest_side))
            seen = _seen(ImageOps.exif_transpose(picture), longest_side)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{file}: expected a picture of up to {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} "
            f"megapixels, found a larger one ({error}); make it smaller"
        ) from error
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(
            f"{file}: expected a picture, found what cannot be read as one ({error}); open it in "
            "another program and save it again, or take it out of the folder"
        ) from error
    pixels = torch.from_numpy(seen)[None]
    if pixels.shape[-1] == 4 and bool((pixels[..., 3] == 1).all()):
        pixels = pixels[..., :3]
    caption = file.with_suffix(".txt")
    text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
    return Photo(file.name, pixels, text, _line(file.name, size, turned, pixels))


def _seen(picture: Image.Image, longest_side: int) -> np.ndarray:
    """(H, W, 3 or 4) in 0..1."""
    if picture.mode.startswith("I"):
        # 16 bits of grey, which Pillow would cut off at the 255th of them.
        grey = np.asarray(picture).astype(np.float32) / _DEEPEST
        picture = Image.fromarray(grey.clip(0, 1) * 255, "F")
    else:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if longest_side and max(picture.size) > longest_side:
        scale = longest_side / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32).clip(0, 255) / 255
    return pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, -1)


def _line(name: str, size: tuple[int, int], turned: bool, pixels: Tensor) -> str:
    height, width = pixels.shape[1:3]
    done = ["turned upright"] if turned else []
    if sorted(size) != sorted((width, height)):
        done.append(f"made smaller to {width}x{height}")
    if pixels.shape[-1] == 4:
        done.append("transparent parts are not learned")
    return f"{name}: {size[0]}x{size[1]}{''.join(f', {each}' for each in done)}"


def _counting(file: Path) -> list[tuple[int, str]]:
    """Sorts 2.jpg before 10.jpg."""
    parts = re.split(r"(\d+)", os.fspath(file.name).lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
