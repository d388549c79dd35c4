"""Real ComfyUI models with random weights: true structure and text widths, few channels."""

from __future__ import annotations

import copy
import functools
import os

from inprocess import load_pack

load_pack()

import comfy.sample  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import comfy.text_encoders.sd2_clip as sd2_clip  # noqa: E402
import folder_paths  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from comfy import (  # noqa: E402
    controlnet,
    model_base,
    model_patcher,
    ops,
    sd,
    sd1_clip,
    sdxl_clip,
)
from comfy.cldm.cldm import ControlNet as ControlNetwork  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from comfyui_perfusion.host.interface import messages  # noqa: E402
from comfyui_perfusion.host.models.families import cross_attentions, family_of  # noqa: E402
from comfyui_perfusion.host.models.networks import SECOND_TEXTS  # noqa: E402
from comfyui_perfusion.perfusion import Concept, edit_projection  # noqa: E402
from comfyui_perfusion.perfusion.gated.gate import Gate  # noqa: E402

from benchmarks._structures import STRUCTURES  # noqa: E402

# One thread unless told otherwise: small tensors, and a machine that may be busy.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

CPU = torch.device("cpu")

CONFIGS = {
    "sd1": supported.SD15,
    "small": supported.SD15,
    "sd1_light": supported.SD15,
    "sd2_light": supported.SD20,
    "sdxl_light": supported.SDXL,
    "sd2": supported.SD20,
    "sdxl": supported.SDXL,
    "sdxl_refiner": supported.SDXLRefiner,
}
# As published 320 (refiner 384); heads of 64 channels need at least 64 where there is attention.
CHANNELS = {
    "sd1": 32,
    "small": 32,
    "sd1_light": 32,
    "sd2": 64,
    "sd2_light": 64,
    "sdxl": 32,
    "sdxl_light": 64,
    "sdxl_refiner": 32,
}
TEXT = {
    "sd1": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
    "sd2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
    "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    "sdxl_refiner": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLRefinerClipModel),
}
WORDS = ("cat", "river", "lamp", "horse", "bread", "music", "stone")
SMALL_TEXT = {"num_hidden_layers": 3, "intermediate_size": 64}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights of a plausible scale, so that signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif "token_embedding" in name:
                # 1009 different rows, over and over: the whole table would take seconds.
                rows = torch.randn(1009, parameter.shape[1], generator=generator) * 0.5
                parameter.copy_(rows[torch.arange(parameter.shape[0]) % len(rows)])
            else:
                scale = 0.5 if "embedding" in name else parameter[0].numel() ** -0.5
                parameter.normal_(0, scale, generator=generator)


def build_base_model(
    family: str,
    channels: int | None = None,
    device: str = "cpu",
    model_type: model_base.ModelType | None = None,
) -> model_base.BaseModel:
    """A ComfyUI BaseModel of a family, with few channels unless told otherwise."""
    config = CONFIGS[family]({**STRUCTURES[family], "model_channels": channels or CHANNELS[family]})
    config.set_inference_dtype(torch.float32, None)
    if family in ("sdxl", "sdxl_light"):
        kind = model_type or model_base.ModelType.EPS
        return model_base.SDXL(config, kind, device=torch.device(device))
    if family == "sdxl_refiner":
        return model_base.SDXLRefiner(config, device=torch.device(device))
    v_prediction = family in ("sd2", "sd2_light")
    default = model_base.ModelType.V_PREDICTION if v_prediction else model_base.ModelType.EPS
    return model_base.BaseModel(config, model_type or default, device=torch.device(device))


def build_model(
    family: str, seed: int = 0, model_type: model_base.ModelType | None = None
) -> model_patcher.ModelPatcher:
    """A MODEL with random weights, as a loader node would hand it out."""
    base = build_base_model(family, model_type=model_type)
    randomise(base.diffusion_model, seed)
    return build_patcher(base)


def build_patcher(base: model_base.BaseModel) -> model_patcher.ModelPatcher:
    """A patcher around a model, on the CPU."""
    return model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)


def build_clip(family: str, seed: int = 1) -> sd.CLIP:
    """A CLIP with random weights and the true widths."""
    tokenizer, encoder = TEXT[family]
    options = {f"clip_{name}_model_config": SMALL_TEXT for name in "lgh"}
    clip = sd.CLIP(
        ClipTarget(tokenizer, encoder), model_options={"dtype": torch.float32, **options}
    )
    randomise(clip.cond_stage_model, seed)
    return clip


def build_vae(seed: int = 2) -> sd.VAE:
    """A VAE with random weights, 4 channels on 1/8 of the side."""
    network = TAESD(latent_channels=4)
    randomise(network, seed)
    with torch.no_grad():
        network.vae_scale.fill_(1.0)
    return sd.VAE(sd=dict(network.state_dict()))


def encoding_of(clip: sd.CLIP, word: str) -> torch.Tensor:
    """Of the second token of a word, or of its only one; in each text encoder, side by side."""
    made = clip.encode_from_tokens(clip.tokenize(word), return_dict=True)
    every = (made["cond"], *(made[name] for name in SECOND_TEXTS if name in made))
    return torch.cat([each[0, :2][-1] for each in every])


def build_concept(
    model: model_patcher.ModelPatcher, clip: sd.CLIP, seed: int, placeholder: str, **changes: object
) -> Concept:
    """A concept with random contents that fits the model: its direction is a real encoding."""
    generator = torch.Generator().manual_seed(seed)
    family = family_of(model.model)
    word, other = (encoding_of(clip, WORDS[(seed + offset) % len(WORDS)]) for offset in (0, 3))
    return Concept(
        family=family.name,
        placeholder=placeholder,
        superclass="cat",
        embeddings={
            name: torch.randn(width, generator=generator) * 0.5
            for name, width in family.vectors.items()
        },
        i=word.clone(),
        u=(word + 0.3 * other).clone(),
        superclass_encoding=other.clone(),
        o_v={
            layer.name: torch.randn(layer.value_width, generator=generator)
            for layer in cross_attentions(model.model)
        },
        gate=Gate(0.5, 0.2),
    ).with_gate(**changes)


def build_lora(model: model_patcher.ModelPatcher, seed: int) -> dict[str, torch.Tensor]:
    """A rank-2 LoRA file's content for all text projections of a model."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for layer in cross_attentions(model.model):
        for part, module in (("to_k", layer.to_k), ("to_v", layer.to_v)):
            key = f"diffusion_model.{layer.name}.{part}"
            up, down = (module.out_features, 2), (2, module.in_features)
            lora[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.5
            lora[f"{key}.lora_down.weight"] = (
                torch.randn(down, generator=generator) * module.in_features**-0.5
            )
    return lora


def with_lora(
    model: model_patcher.ModelPatcher, lora: dict[str, torch.Tensor]
) -> model_patcher.ModelPatcher:
    """What ComfyUI's LoRA loader makes of a model."""
    return sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def pure_model(
    model: model_patcher.ModelPatcher,
    concepts: list[Concept],
    lora: dict[str, torch.Tensor] | None = None,
) -> model_patcher.ModelPatcher:
    """A separate copy of a model whose projections are the pure function of eq. 3."""
    config = model.model.model_config
    base = copy.deepcopy(model.model, {id(config): config})
    for layer in cross_attentions(base):
        for part, module in (("to_k", layer.to_k), ("to_v", layer.to_v)):
            key = f"diffusion_model.{layer.name}.{part}"
            weight = module.weight.detach().to(torch.float32, copy=True)
            if lora is not None:
                weight += lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
            outputs = [
                weight @ concept.superclass_encoding if part == "to_k" else concept.o_v[layer.name]
                for concept in concepts
            ]
            module.forward = functools.partial(
                _edited, weight, [c.direction() for c in concepts], outputs
            )
    return build_patcher(base)


def _edited(weight, directions, outputs, encodings):
    return edit_projection(weight, encodings, directions, torch.stack(outputs))


def encode(clip: sd.CLIP, prompt: str) -> list:
    """What ComfyUI's CLIPTextEncode makes of a prompt."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def sample(
    model: model_patcher.ModelPatcher, clip: sd.CLIP, prompt: str, steps: int = 2
) -> torch.Tensor:
    """Latents sampled the way KSampler does it, guidance included."""
    return sample_conds(model, encode(clip, prompt), encode(clip, ""), steps)


def sample_conds(
    model: model_patcher.ModelPatcher,
    positive: list,
    negative: list,
    steps: int = 2,
    cfg: float = 2.0,
    batch: int = 1,
) -> torch.Tensor:
    """Latents of conditionings; the noise is that of the seed 0."""
    with torch.inference_mode():
        latent = torch.zeros(batch, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "normal",
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=0,
        )


def build_controlnet(family: str, seed: int) -> controlnet.ControlNet:
    """A ControlNet of a family's structure with random weights."""
    config = {
        key: value
        for key, value in model_config(family).items()
        if key not in ("image_size", "out_channels", "transformer_depth_output")
        and not key.startswith("use_temporal")
    }
    config["adm_in_channels"] = STRUCTURES[family]["adm_in_channels"]
    network = ControlNetwork(
        image_size=32,
        hint_channels=3,
        num_heads=-1,
        num_head_channels=32,
        device=CPU,
        operations=ops.disable_weight_init,
        **config,
    )
    randomise(network, seed)
    return controlnet.ControlNet(network, load_device=CPU)


def model_config(family: str) -> dict:
    """The UNet settings of a family, with few channels."""
    return {**STRUCTURES[family], "model_channels": CHANNELS[family]}


def state_of(patcher: model_patcher.ModelPatcher) -> dict[str, torch.Tensor]:
    """A copy of all weights as they are stored when nothing is loaded."""
    with torch.inference_mode(False):
        return {key: value.clone() for key, value in patcher.model.state_dict().items()}


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two states are bit-identical."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )


class Worlds:
    """Builds each family's model and text encoder once per session."""

    def __init__(self) -> None:
        self._models: dict[str, model_patcher.ModelPatcher] = {}
        self._clips: dict[str, sd.CLIP] = {}

    lora = staticmethod(build_lora)
    with_lora = staticmethod(with_lora)
    pure = staticmethod(pure_model)
    sample = staticmethod(sample)
    encode = staticmethod(encode)
    sample_conds = staticmethod(sample_conds)
    controlnet = staticmethod(build_controlnet)
    state = staticmethod(state_of)
    same = staticmethod(same_state)
    base_model = staticmethod(build_base_model)
    randomise = staticmethod(randomise)
    patcher = staticmethod(build_patcher)
    new_model = staticmethod(build_model)
    new_clip = staticmethod(build_clip)
    vae = staticmethod(build_vae)
    fitting_concept = staticmethod(build_concept)

    def model(self, family: str) -> model_patcher.ModelPatcher:
        if family not in self._models:
            self._models[family] = build_model(family)
        return self._models[family].clone()

    def clip(self, family: str) -> sd.CLIP:
        family = family.removesuffix("_light")
        if family not in self._clips:
            self._clips[family] = build_clip(family)
        return self._clips[family].clone()

    def concept(
        self, family: str, seed: int = 0, placeholder: str = "<thing>", **changes: object
    ) -> Concept:
        return build_concept(self.model(family), self.clip(family), seed, placeholder, **changes)


@pytest.fixture(scope="session", autouse=True)
def _covariances_elsewhere(tmp_path_factory):
    """What is measured in tests stays out of ComfyUI's models folder."""
    place = str(tmp_path_factory.mktemp("perfusion_covariance"))
    paths, extensions = folder_paths.folder_names_and_paths["perfusion_covariance"]
    folder_paths.folder_names_and_paths["perfusion_covariance"] = ([place], extensions)
    yield
    folder_paths.folder_names_and_paths["perfusion_covariance"] = (paths, extensions)


@pytest.fixture(scope="session", autouse=True)
def _concepts_elsewhere(tmp_path_factory):
    """So do the folders of training runs."""
    place = str(tmp_path_factory.mktemp("perfusion"))
    paths, extensions = folder_paths.folder_names_and_paths["perfusion"]
    folder_paths.folder_names_and_paths["perfusion"] = ([place, *paths[1:]], extensions)
    yield
    folder_paths.folder_names_and_paths["perfusion"] = (paths, extensions)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    """A warning of one test, given once for each run of a node, is news to the next."""
    messages._said.clear()


@pytest.fixture(scope="session")
def worlds() -> Worlds:
    """The models of all families."""
    return Worlds()
