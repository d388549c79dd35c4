"""The small world for benchmarks: its model, its judge, and pictures of many prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inprocess import load_pack

load_pack()

from comfyui_perfusion.demo.model.small_model import load_small_model  # noqa: E402
from comfyui_perfusion.host.closed_form.prompts import PromptEncoder  # noqa: E402
from comfyui_perfusion.host.closed_form.readings import text_side  # noqa: E402
from comfyui_perfusion.host.closed_form.weight_patches import (  # noqa: E402
    EditSettings,
    Task,
    apply_edit,
)
from comfyui_perfusion.host.text.covariance import measure_covariance  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.preserve import Preserved  # noqa: E402
from comfyui_perfusion.perfusion.closed_form.solver import Constraints  # noqa: E402

from demo.captions import sample_captions  # noqa: E402
from demo.fidelity import to_judge  # noqa: E402
from demo.generate import generate  # noqa: E402
from demo.judge import Judge, load_judge  # noqa: E402
from demo.world import WEIGHTS, world_weights  # noqa: E402


class World:
    """Model, text encoder, autoencoder and judge, loaded once."""

    def __init__(self) -> None:
        self.model, self.clip, self.vae = load_small_model(world_weights())
        self.judge: Judge = load_judge(WEIGHTS / "judge.safetensors")
        self.encode = PromptEncoder(self.clip)
        self.statistics = measure_covariance(self.clip, sample_captions(600))

    def edited(
        self,
        model: Any,
        constraints: Constraints,
        ridge: float,
        label: str,
        preserved: Preserved | None = None,
    ) -> Any:
        """The model with one more edit of every key and value."""
        settings = EditSettings(ridge)
        side = text_side(model, self.clip, settings.layers, settings.with_to_k)
        tasks = [Task(each.keys, each.width, constraints, preserved) for each in side.readings]
        return apply_edit(model, tasks, settings, label)[0]

    def draw(self, model: Any, prompts: Sequence[str], seed: int) -> Pictures:
        """Pictures of prompts; the k-th starts from the same noise whatever the model."""
        pictures = generate(model, self.clip, self.vae, list(prompts), seed)
        with torch.no_grad():
            return Pictures(pictures, self.judge.read(self.judge.features(to_judge(pictures))))


class Pictures:
    """Pictures and what the judge reads off them."""

    def __init__(self, pictures: Tensor, logits: Mapping[str, Tensor]) -> None:
        self.pictures = pictures
        self.logits = logits

    def shown(self, head: str, index: int) -> Tensor:
        """(n,) bool: pictures for which this is the likeliest answer of a head."""
        return self.logits[head].argmax(1) == index

    def rather(self, head: str, one: int, other: int) -> Tensor:
        """(n,) bool: pictures for which one answer of a head is likelier than another."""
        return self.logits[head][:, one] > self.logits[head][:, other]

    def part(self, start: int, stop: int) -> Pictures:
        """Some of them."""
        logits = {name: rows[start:stop] for name, rows in self.logits.items()}
        return Pictures(self.pictures[start:stop], logits)


def share(right: Tensor) -> float:
    """Per cent of true values."""
    return round(100 * float(right.float().mean()), 1)
