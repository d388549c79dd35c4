"""Small transformers with a text cross-attention, and what a closed-form edit of them should be."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import torch
from comfyui_perfusion.host.closed_form.readings import text_side
from comfyui_perfusion.host.models.editable import EDITED
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.nodes.edit_assumption import PerfusionEditAssumption

from tests.host.cross_models import CROSS, build_cross, family_row

RIDGE = 1e-2
SOLVING = {"ridge": RIDGE, "with_to_k": True, "strength": 1.0, "layers": "", "restart": False}
SOURCE, DESTINATION = "a mug on a table", "an old mug on a table"
PREFIX = "diffusion_model."
# Sums of some thousand products in fp32, relative to the largest value.
CLOSE = 2e-4

# HunyuanDiT's maps read two encodings of different widths.
ACTED_ON = [name for name in CROSS if family_row(name).network in EDITED]


class Small:
    """A family's small MODEL and CLIP."""

    def __init__(self, name):
        self.name = name
        self.row = CROSS[name]
        self.model, self.clip = build_cross(name), self.row.clip()

    def sample(self, model, prompt=SOURCE):
        with torch.inference_mode():
            both = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))] * 2
            latent = torch.zeros(self.row.latent)
            noise = comfy.sample.prepare_noise(latent, 0)
            return comfy.sample.sample(
                *(model, noise, 1, 1.0, "euler", "simple", *both, latent), disable_pbar=True, seed=0
            )

    def given(self, prompt, model=None):
        """Path -> what each projection is given while a prompt is sampled (N, D)."""
        model = model or self.model
        seen, hooks = {}, []
        for layer in cross_attentions(model.model):
            for at, module in enumerate(layer.modules):

                def note(_module, inputs, _output, path=(layer.name, at)):
                    seen[path] = inputs[0][0].detach().float().clone()

                hooks.append(module.register_forward_hook(note))
        try:
            self.sample(model, prompt)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def encode(self, prompts, model=None):
        (reading,) = text_side(model or self.model, self.clip, "", True).readings
        return reading.encoders[0](prompts)

    def edited_keys(self):
        """The weights of all keys and values."""
        return [
            f"{PREFIX}{layer.name}.{part}.weight"
            for layer in cross_attentions(self.model.model)
            for part in family_row(self.name).network.projections
        ]


def assume(small, model=None, **changes):
    settings = {"augment": False, "with_padding": False, **SOLVING, **changes}
    return PerfusionEditAssumption.execute(
        model or small.model, small.clip, SOURCE, DESTINATION, **settings
    ).args


def weights_of(model):
    """All weights of a MODEL as ComfyUI computes them when it loads it."""
    comfy.model_management.unload_all_models()
    return {
        key: model.patch_weight_to_device(key, return_weight=True).float().clone()
        for key in model.model.state_dict()
        if key.startswith(PREFIX)
    }


def close_to(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=CLOSE)


def formula(weight, inputs, targets, ridge=RIDGE):
    """dW of the paper's normal equations, in fp64."""
    weight, inputs, targets = weight.double(), inputs.double(), targets.double()
    system = inputs.mT @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
    wanted = (targets - inputs) @ weight.mT
    return torch.linalg.solve(system, inputs.mT @ wanted).mT.float()
