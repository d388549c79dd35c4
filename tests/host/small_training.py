"""What tests of training runs share: the small world's model, and short trainings with it."""

from __future__ import annotations

import os
import re

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.clip_model import CLIPAttention
from comfy.ldm.modules.attention import CrossAttention
from comfyui_perfusion.demo.captions import sample_captions
from comfyui_perfusion.demo.model import small_model
from comfyui_perfusion.demo.world import personal_pictures, world_weights
from comfyui_perfusion.host.files.concept_files import signed
from comfyui_perfusion.host.models.loaded import Models
from comfyui_perfusion.host.pictures.training_images import encode_images
from comfyui_perfusion.host.text.covariance import measure_covariance
from comfyui_perfusion.host.training.options import TrainingOptions
from comfyui_perfusion.host.training.samples import Painter
from comfyui_perfusion.host.training.session import Session
from comfyui_perfusion.host.training.train import Material, train
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.nodes.training import PerfusionTrainConcept
from comfyui_perfusion.perfusion import TrainingConfig
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.host.conftest import randomise

STEPS = 4
SETTINGS = {
    "placeholder": "<bo>",
    "superclass": "teddy",
    "steps": STEPS,
    "batch_size": 2,
    "learning_rate": 0.1,
}
OPTIONS = {
    # Runs with it can be made longer.
    "schedule": "constant",
    "templates": ("a {}", "a photo of a {}"),
    "sample_every": 2,
    "sample_prompts": ("a {} on the beach",),
    "sample_steps": 1,
    "checkpoint_every": 2,
}
# The small world's UNet with one block of each kind and weights that were never trained, and the
# first layer of its text encoder.
SMALLER_TEXT = {"num_hidden_layers": 1}
SMALLER = {
    "model_channels": 32,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}


class SmallTraining:
    """A model with pictures; `run` trains as the node does."""

    def __init__(self, monkeypatch) -> None:
        monkeypatch.setattr(small_model, "UNET_CONFIG", {**small_model.UNET_CONFIG, **SMALLER})
        text = {**small_model.TEXT_CONFIG, **SMALLER_TEXT}
        monkeypatch.setattr(small_model, "TEXT_CONFIG", text)
        unet = small_model.build_unet().diffusion_model
        randomise(unet, 0)
        left_out = re.compile(r"unet\.|text\..*\.layers\.[1-9]")
        trained = {k: v for k, v in world_weights().items() if not left_out.match(k)}
        weights = trained | {f"unet.{name}": value for name, value in unet.state_dict().items()}
        self.model, self.clip, self.vae = small_model.load_small_model(weights)
        self.images, self.masks = personal_pictures("Bo the teddy", 2, 0)
        self.covariance = measure_covariance(self.clip, sample_captions(60))
        self._pictures = encode_images(self.vae, [self.images], [self.masks])
        self._before = self._weights()

    def run(self, config=None, clip_vision=None, **options):
        """`Trained`; `config` changes main settings, the rest is for `TrainingOptions`."""
        with torch.inference_mode():
            return train(
                Models(self.model, self.clip, self.vae),
                Material([self.images], [self.masks], self.covariance),
                TrainingConfig(**{**SETTINGS, **(config or {})}),
                TrainingOptions(**{**OPTIONS, **options}),
                clip_vision=clip_vision,
            )

    def run_node(self, **changes):
        """What the node returns; `changes` are its inputs as ComfyUI passes them: lists."""
        given = {
            **{"model": [self.model], "clip": [self.clip], "vae": [self.vae]},
            **{"images": [self.images], "mask": [self.masks], "covariance": [self.covariance]},
            **{name: [value] for name, value in SETTINGS.items()},
            **{"embedding_learning_rate": [0.006], "seed": [0]},
            "options": [TrainingOptions(**OPTIONS)],
        }
        lists = {k: v for k, v in {**given, **changes}.items() if v is not None}
        with torch.inference_mode():
            return PerfusionTrainConcept.execute(**lists)

    def run_session(self):
        """What `run` does after its checks, with gradient checkpointing; for many runs in a row."""
        options = TrainingOptions(**OPTIONS)
        config = TrainingConfig(**SETTINGS).with_settings(options)
        words = config.superclass, config.placeholder
        with torch.inference_mode():
            painter = Painter(self.vae)
            with training_view(self.model, self.clip, self._pictures, *words, "auto", True) as view:
                session = Session(view, painter, config, options, self.covariance, signed)
                session.train()
        session.finish()

    def is_untouched(self) -> bool:
        """Whether model and text encoder are bit for bit what they were, and no training is on."""
        return self._weights() == self._before and not comfy.model_management.in_training

    def _weights(self) -> list[dict[str, bytes]]:
        # As bytes: some weights of the text encoder are not used, and may be NaN.
        return [
            {name: weight.numpy().tobytes() for name, weight in patcher.model.state_dict().items()}
            for patcher in (self.model, self.clip.patcher)
        ]


def use_folder(monkeypatch, folder):
    """Make a folder the place of concepts and runs."""
    _, extensions = folder_paths.folder_names_and_paths["perfusion"]
    entry = ([str(folder)], extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "perfusion", entry)


def run_folder(folder):
    """The folder of the only run there is."""
    (found,) = (folder / "runs").iterdir()
    return found


class Tripwire:
    """Counts attentions, told progress, written files; `at` is asked at each with its place.

    Places: inside the "text" encoder, the "model", its "backward" pass (where checkpointed blocks
    run again) or a "sample"; when "progress" is told between steps; while a "file" is written.
    """

    def __init__(self, monkeypatch, at) -> None:
        self._at = at
        self.steps = 0
        sync = os.fsync
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: at("progress"))
        monkeypatch.setattr("os.fsync", lambda file: (at("file"), sync(file)))
        self._hooks = [
            register_module_forward_pre_hook(self._module),
            register_optimizer_step_post_hook(self._step),
        ]

    def remove(self) -> None:
        """Nothing is watched any more."""
        for hook in self._hooks:
            hook.remove()

    def _step(self, *_) -> None:
        self.steps += 1

    def _module(self, module, _) -> None:
        if not isinstance(module, CLIPAttention | CrossAttention):
            return
        if not comfy.model_management.in_training:
            # Estimating memory runs the model's structure, with gradients.
            if not torch.is_grad_enabled():
                self._at("sample")
        elif torch._C._current_graph_task_id() >= 0:
            self._at("backward")
        else:
            self._at("text" if isinstance(module, CLIPAttention) else "model")
