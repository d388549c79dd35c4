"""Contact sheets: many small pictures in one, enlarged with hard pixels."""

import torch
from PIL import Image
from torch import Tensor


def sheet(pictures: Tensor, columns: int, scale: int = 4, gap: int = 2) -> Image.Image:
    """Pictures uint8 (n, 3, H, W) in rows of ``columns``."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    step_y, step_x = height * scale + gap, width * scale + gap
    out = torch.full((rows * step_y - gap, columns * step_x - gap, 3), 255, dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        large = picture.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        out[
            row * step_y : row * step_y + height * scale,
            column * step_x : column * step_x + width * scale,
        ] = large
    return Image.fromarray(out.numpy())
