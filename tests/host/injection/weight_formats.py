"""The forms in which people load weights: quantised by ComfyUI, or by packs as they do it.

Every builder takes the weights of a small SD1.x UNet in fp32 and gives a MODEL that holds them in
its form, and what they are there, as plain fp32 weights.
"""

from __future__ import annotations

import json

import comfy.lora
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy import model_base, model_patcher
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

CPU = torch.device("cpu")
BLOCK = 32
LIGHT = "sd1_light"

State = dict[str, torch.Tensor]

# A call of the small UNet is some two hundred operations in a row, whose longest sums that two ways
# may take in another order are those over the text's width.
OPERATIONS = 200
PRODUCTS = 768
# Guidance of 2 takes twice one prediction and once the other.
GUIDANCE = 3


def agreement(dtype: torch.dtype) -> float:
    """How far two ways of one sampling step may differ, relative to the largest value.

    Every result is rounded by at most half the dtype's step, in fp32 every addition of a sum, too;
    half precision is summed in fp32. Such errors have no common sign, so they grow with the root
    of their number.
    """
    roundings = OPERATIONS * (PRODUCTS if dtype is torch.float32 else 1)
    return GUIDANCE * roundings**0.5 * torch.finfo(dtype).eps / 2


def quantised_state(
    state: State, algorithm: str, part: str, full_precision: bool = True
) -> tuple[State, State]:
    """A checkpoint that says layer by layer how it is quantised ("comfy_quant"), and what it means.

    Linear weights with `part` in their names are.
    """
    conf = {"format": algorithm, "full_precision_matrix_mult": full_precision}
    note = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    stored, meant = {}, {}
    for key, weight in state.items():
        stored[key] = meant[key] = weight
        if part not in key or weight.ndim != 2 or not key.endswith(".weight"):
            continue
        quantised = QuantizedTensor.from_float(weight, layout, scale="recalculate")
        meant[key] = quantised.dequantize()
        del stored[key]
        stored |= quantised.state_dict(key) | {f"{key.removesuffix('weight')}comfy_quant": note}
    return stored, meant


def quantised_by_comfyui(
    worlds, state: State, algorithm: str, full_precision: bool = True, family: str = LIGHT
):
    """All linear weights of the attentions, as ComfyUI loads them."""
    stored, plain = quantised_state(state, algorithm, ".attn", full_precision)
    # As in a graph: what is made outside of inference mode cannot be moved inside of it.
    with torch.inference_mode():
        model = _empty(worlds, family, quant_config={"mixed_ops": True})
        model.diffusion_model.load_state_dict(stored, strict=False)
    return worlds.patcher(model), plain


class PackedWeight(torch.Tensor):
    """Eight bits a value and a scale for every block of a row, as Q8_0 is; its shape is a claim.

    This and the two classes below were compared with ComfyUI-GGUF's own (its GGMLTensor, GGMLOps
    and GGUFModelPatcher of December 2025) on 2026-11-21, with files of an SD1.x-like UNet and of a
    small Wan in Q8_0 and Q4_0 and with an encoder of Wan's: what concepts, LoRA beside them,
    streaming, training and the LoRA of an edit do there is what they do here, each equal to the
    last bit to the same on the unpacked weights.
    """

    claimed: torch.Size
    scales: torch.Tensor
    patches: list

    @staticmethod
    def of(weight: torch.Tensor) -> PackedWeight:
        blocks = weight.reshape(-1, BLOCK)
        scales = blocks.abs().amax(1, keepdim=True) / 127
        packed = (blocks / scales).round().to(torch.int8).as_subclass(PackedWeight)
        packed.claimed, packed.scales, packed.patches = weight.shape, scales, []
        return packed

    @property
    def shape(self):
        return getattr(self, "claimed", None) or self.size()

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        moved.claimed, moved.scales = self.claimed, self.scales
        moved.patches = list(self.patches)
        return moved

    # What loaders make of a state would lose the claims.
    def clone(self, *args, **kwargs):
        return self

    def detach(self):
        return self

    def unpacked(self) -> torch.Tensor:
        """The weight that is meant, in fp32."""
        plain = self.as_subclass(torch.Tensor).float() * self.scales
        weight = plain.reshape(self.claimed)
        for patches, key in self.patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight


class PackedPatcher(model_patcher.ModelPatcher):
    """A pack's own patcher, which leaves patches beside packed weights."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        if key not in self.patches:
            return
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, PackedWeight):
            super().patch_weight_to_device(key, device_to, inplace_update)
            return
        moved = weight.to(device_to)
        moved.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, moved)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters():
            if isinstance(weight, PackedWeight) and unpatch_weights:
                weight.patches = []
        super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)


class PackedOps(comfy.ops.manual_cast):
    """Operations of a pack that unpacks weights where they are used, as ComfyUI-GGUF does."""

    class Linear(comfy.ops.manual_cast.Linear):
        largest = False

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight, bias = (state_dict.get(f"{prefix}{name}") for name in ("weight", "bias"))
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.largest = getattr(weight, "largest", False)
            if bias is not None:
                self.bias = torch.nn.Parameter(bias, requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            # For estimates of memory only, with room for the largest weight unpacked.
            if not isinstance(self.weight, PackedWeight):
                super()._save_to_state_dict(destination, prefix, keep_vars)
                return
            destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")
            if self.bias is not None:
                destination[f"{prefix}bias"] = torch.zeros_like(self.bias, device="meta")
            if self.largest:
                room = torch.empty(self.weight.shape, dtype=torch.float16, device="meta")
                destination[f"{prefix}temp.weight"] = room

        def forward_comfy_cast_weights(self, input):
            weight = self.weight
            weight = weight.unpacked() if isinstance(weight, PackedWeight) else weight
            return torch.nn.functional.linear(input, weight.to(input.dtype), self.bias)


def packed(worlds, state: State):
    """All linear weights of the attentions packed."""
    stored = {
        key: PackedWeight.of(value) if ".attn" in key and value.ndim == 2 else value
        for key, value in state.items()
    }
    packs = [value for value in stored.values() if isinstance(value, PackedWeight)]
    max(packs, key=torch.Tensor.numel).largest = True
    model = _empty(worlds, custom_operations=PackedOps)
    model.diffusion_model.load_state_dict(stored, strict=False)
    plain = {
        key: value.unpacked() if isinstance(value, PackedWeight) else value
        for key, value in stored.items()
    }
    return PackedPatcher(model, CPU, CPU), plain


class LowRankLinear(torch.nn.Module):
    """A map without a weight, in parts of its own, as nunchaku's `SVDQW4A4Linear` is.

    Its code was read on 2026-11-21, not run: it computes on NVIDIA cards only.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.proj_up = torch.nn.Parameter(left[:, :8] * values[:8], requires_grad=False)
        self.proj_down = torch.nn.Parameter(right[:8], requires_grad=False)
        rest = (weight - self.proj_up @ self.proj_down).to(torch.bfloat16)
        self.qweight = torch.nn.Parameter(rest, requires_grad=False)
        self.bias = bias

    def whole(self) -> torch.Tensor:
        """The weight that is meant, in fp32."""
        return self.proj_up @ self.proj_down + self.qweight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _batch, _tokens, _width = x.shape
        rest = torch.nn.functional.linear(x, self.qweight.to(x.dtype), self.bias)
        return rest + x @ self.proj_down.to(x.dtype).mT @ self.proj_up.to(x.dtype).mT


def replaced_maps(worlds, state: State):
    """Text projections that are another pack's modules, reachable under their names."""
    model, plain = _empty(worlds), dict(state)
    model.diffusion_model.load_state_dict(state)
    for name, module in list(model.diffusion_model.named_modules()):
        if name.endswith(".attn2"):
            for part in ("to_k", "to_v"):
                map_ = LowRankLinear(getattr(module, part).weight, None)
                plain[f"{name}.{part}.weight"] = map_.whole()
                setattr(module, part, map_)
    return worlds.patcher(model), plain


class FusedAttention(torch.nn.Module):
    """A cross-attention whose keys and values come out of one kernel that nothing can reach."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.kernel = [attention]

    def forward(self, *args, **kwargs):
        return self.kernel[0](*args, **kwargs)


def fused_attentions(worlds, state: State):
    """One cross-attention of several replaced as a whole."""
    model = _empty(worlds)
    model.diffusion_model.load_state_dict(state)
    block = model.diffusion_model.middle_block[1].transformer_blocks[0]
    block.attn2 = FusedAttention(block.attn2)
    return worlds.patcher(model)


class WrappedNetwork(torch.nn.Module):
    """A whole network of another pack's in the place of ComfyUI's, as nunchaku's for Flux is."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.dtype = network, network.dtype


def wrapped_network(model: model_base.BaseModel) -> model_base.BaseModel:
    """The same model with its network wrapped."""
    model.diffusion_model = WrappedNetwork(model.diffusion_model)
    return model


def plain(worlds, state: State, dtype: torch.dtype = torch.float32):
    """An ordinary MODEL with these weights, stored and computed in a dtype."""
    model = _empty(worlds, dtype=dtype)
    model.diffusion_model.load_state_dict(state)
    return worlds.patcher(model)


def partly_loaded(model: model_patcher.ModelPatcher) -> model_patcher.ModelPatcher:
    """Loaded with room for a third of the weights; the rest comes, and is patched, when used."""
    comfy.model_management.unload_all_models()
    size = model.model_size()
    model.model_patches_to(model.load_device)
    loaded = comfy.model_management.LoadedModel(model)
    loaded.real_model = None
    loaded.model_load(lowvram_model_memory=size // 3)
    comfy.model_management.current_loaded_models.insert(0, loaded)
    assert model.model.model_lowvram
    return model


def _empty(
    worlds, family: str = LIGHT, dtype: torch.dtype = torch.float32, **config
) -> model_base.BaseModel:
    settings = worlds.base_model(family).model_config
    kind = type(settings)({**settings.unet_config, "dtype": dtype})
    cast = torch.float32 if config else None
    kind.set_inference_dtype(dtype, cast)
    for name, value in config.items():
        setattr(kind, name, value)
    return model_base.BaseModel(kind, device=CPU)
