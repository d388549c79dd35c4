"""What a UNet draws under twin lock, by the pure function and nothing of the host's."""

from __future__ import annotations

import functools

import torch
from comfyui_perfusion.host.models.families import cross_attentions
from comfyui_perfusion.perfusion.gated.twin_lock import twin_projection


def oracle(worlds, model, concepts, pairs, acting=lambda layer, concept: True, lora=None):
    """A UNet that reads twins, with values by the pure function of a table of (e, t), (1, N, D).

    Weights are read when they are used, as hooks change them; `lora` comes on top of them.
    """
    pure = worlds.pure(model, [])

    def weight_of(module, name, part):
        weight = module.weight.detach().to(torch.float32)
        if lora is None:
            return weight
        key = f"diffusion_model.{name}.{part}"
        return weight + lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]

    def pair_of(row):
        for prompt, twin in pairs:
            # ComfyUI repeats a shorter conditioning to the length of a longer one.
            times, rest = divmod(len(row), twin.shape[1])
            if rest == 0 and torch.equal(twin[0].repeat(times, 1), row):
                return prompt[0].repeat(times, 1), twin[0].repeat(times, 1)
        raise AssertionError("the model reads something else than a twin")

    def keys(module, name, context):
        return torch.nn.functional.linear(context, weight_of(module, name, "to_k"))

    def values(module, name, context):
        weight = weight_of(module, name, "to_v")
        chosen = [concept for concept in concepts if acting(name, concept)]
        if not chosen:
            return torch.nn.functional.linear(context, weight)
        outputs = torch.stack([concept.o_v[name] for concept in chosen])
        directions = [concept.twin_direction() for concept in chosen]
        rows = [twin_projection(weight, *pair_of(row), directions, outputs) for row in context]
        return torch.stack(rows)

    for layer in cross_attentions(pure.model):
        layer.to_k.forward = functools.partial(keys, layer.to_k, layer.name)
        layer.to_v.forward = functools.partial(values, layer.to_v, layer.name)
    return pure
