"""Ways to teach the small world a thing of one's own, each learned and drawn alike.

The gated locks and textual inversion train as the node does. Train LoRA is ComfyUI's own node, as
a user without this pack would take it: taught with the everyday word, or with a word that says
nothing put before it (a "weird" teddy), which is then what asks for the thing. It gets its pictures
one by one, and its optimiser steps after as many as the others have in a batch: in a batch of its
own it computes every picture with every caption, for the same number of pictures in four times the
time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inprocess import load_pack

load_pack()

import comfy.sd  # noqa: E402
import comfy_extras.nodes_train as nodes_train  # noqa: E402
import torch  # noqa: E402
from comfyui_perfusion.host.injection.apply import apply_concepts  # noqa: E402
from comfyui_perfusion.host.pictures.training_images import encode_images  # noqa: E402
from comfyui_perfusion.host.training.view import training_view  # noqa: E402
from comfyui_perfusion.perfusion import (  # noqa: E402
    Concept,
    Covariance,
    TrainingConfig,
    save_concept,
    train_concept,
)
from comfyui_perfusion.perfusion.text.prompts import TEMPLATES, fill  # noqa: E402
from torch import Tensor  # noqa: E402

from demo.generate import generate  # noqa: E402
from demo.things import Look, superclass_of  # noqa: E402
from demo.world import photographs  # noqa: E402

from ._small_world import World  # noqa: E402

PHOTOGRAPHS, BATCH, RANK = 5, 4, 4
TRIGGER = "weird"
"""A word of the small world's captions that says nothing of a picture."""


@dataclass(frozen=True)
class Settings:
    """What may be tuned.

    Attributes:
        rate: of the outputs (relative) or of the LoRA.
        vector_rate: of the placeholder's vector (relative), where it is learned.
        steps: how many.
        batch: pictures in a step.
    """

    rate: float
    vector_rate: float = TrainingConfig.embedding_learning_rate
    steps: int = 150
    batch: int = BATCH


@dataclass(frozen=True)
class Way:
    """A way to teach, and how what it taught is drawn.

    Attributes:
        name: in the table.
        mode: the training's; ComfyUI's own is "lora", or "lora_word" with a word before the
            everyday one.
        lock: the key lock it is drawn with.
    """

    name: str
    mode: str
    lock: str = "local"

    @property
    def is_lora(self) -> bool:
        """Whether it is ComfyUI's own training."""
        return self.mode.startswith("lora")


WAYS = (
    Way("twin lock", "twin_lock", "twin"),
    Way("local lock", "perfusion", "local"),
    Way("global lock", "perfusion", "global"),
    Way("textual inversion", "textual_inversion"),
    Way(f"core Train LoRA, rank {RANK}", "lora"),
    Way("the same, a word before the everyday one", "lora_word"),
)


@dataclass(frozen=True, eq=False)
class Learned:
    """What was taught.

    Attributes:
        word: what asks for the thing in a prompt.
        what: the concept, or a LoRA's weights.
        seconds: processor time of the whole training over its steps.
        size: bytes of the file, in 16 bits.
    """

    word: str
    what: Concept | Mapping[str, Tensor]
    seconds: float
    size: int


def teach(
    world: World, covariance: Covariance, way: Way, thing: str | Look, settings: Settings, seed: int
) -> Learned:
    """Teach a thing by its photographs; ``seed`` decides vector, noise and order."""
    images, masks = photographs(thing, PHOTOGRAPHS, 0)
    started = time.process_time()
    if way.is_lora:
        word = superclass_of(thing)
        if way.mode == "lora_word":
            word = f"{TRIGGER} {word}"
        what = _lora(world, images, word, settings, seed)
        size = sum(2 * tensor.numel() for tensor in what.values())
    else:
        what = _concept(world, covariance, way, thing, images, masks, settings, seed)
        with tempfile.TemporaryDirectory() as folder:
            size = save_concept(what, Path(folder) / "concept.safetensors").stat().st_size
        word = what.placeholder
    return Learned(word, what, (time.process_time() - started) / settings.steps, size)


def draw(
    world: World, way: Way, learned: Sequence[Learned], prompts: Sequence[str], seed: int
) -> Tensor:
    """Pictures uint8 of prompts with all that was learned; with nothing, the model's own."""
    model, clip = world.model, world.clip
    if way.is_lora:
        for each in learned:
            model, _ = comfy.sd.load_lora_for_models(model, None, dict(each.what), 1.0, 0.0)
    elif learned:
        model, clip = apply_concepts(model, clip, [each.what for each in learned], way.lock)
    return generate(model, clip, world.vae, list(prompts), seed)


def _concept(
    world: World,
    covariance: Covariance,
    way: Way,
    thing: str | Look,
    images: Tensor,
    masks: Tensor,
    settings: Settings,
    seed: int,
) -> Concept:
    words = superclass_of(thing), placeholder(thing, seed)
    config = TrainingConfig(
        words[1],
        words[0],
        steps=settings.steps,
        batch_size=settings.batch,
        learning_rate=settings.rate,
        embedding_learning_rate=settings.vector_rate,
        schedule="cosine",
        seed=seed,
        mode=way.mode,
    )
    shown = encode_images(world.vae, [images], [masks])
    with training_view(world.model, world.clip, shown, *words) as view:
        return train_concept(view, config, covariance).concept


def placeholder(thing: str | Look, seed: int) -> str:
    """A thing's own word; another seed gives another, and so another vector with twin lock."""
    name = thing.kind if isinstance(thing, Look) else thing.split()[0].lower()
    return f"<{name}>" if seed == 0 else f"<{name}-{seed}>"


def _lora(
    world: World, images: Tensor, word: str, settings: Settings, seed: int
) -> Mapping[str, Tensor]:
    latents = encode_images(world.vae, [images], None).latents
    with torch.inference_mode():
        texts = [fill(TEMPLATES[n % len(TEMPLATES)], word) for n in range(len(images))]
        positive: list[Any] = []
        for text in texts:
            tokens = world.clip.tokenize(text)
            positive += world.clip.encode_from_tokens_scheduled(tokens)
    torch.manual_seed(seed)  # the node draws timesteps and weights from torch's own generator
    found = nodes_train.TrainLoraNode.execute(
        model=[world.model],
        latents=[{"samples": torch.cat([latent[:1] for latent in latents])}],
        positive=[positive],
        batch_size=[1],
        steps=[settings.steps],
        grad_accumulation_steps=[settings.batch],
        learning_rate=[settings.rate],
        rank=[RANK],
        optimizer=["AdamW"],
        loss_function=["MSE"],
        seed=[seed],
        training_dtype=["fp32"],
        lora_dtype=["fp32"],
        quantized_backward=[False],
        algorithm=["LoRA"],
        gradient_checkpointing=[False],
        checkpoint_depth=[1],
        offloading=[False],
        existing_lora=["[None]"],
        bucket_mode=[False],
        bypass_mode=[False],
    )
    return {name: tensor.clone() for name, tensor in found.args[0].items()}
