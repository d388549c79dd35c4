"""What closed-form edits on transformers with a text cross-attention are solved for.

Hooks on the projections of the running model tell what they are given.
"""

from __future__ import annotations

import pytest
import torch
from comfy import model_patcher
from comfy.quant_ops import QuantizedTensor
from comfyui_perfusion.host.closed_form.edits import preserve_prompts
from comfyui_perfusion.host.models.families import UnsupportedModelError, cross_attentions
from comfyui_perfusion.host.text.covariance import measure_covariance
from comfyui_perfusion.nodes.edit_assumption import PerfusionEditAssumption
from comfyui_perfusion.perfusion.closed_form.matching import match_in_order, words_of

from tests.host.closed_form.cross_edits import (
    DESTINATION,
    PREFIX,
    SOLVING,
    SOURCE,
    assume,
    close_to,
    formula,
    weights_of,
)
from tests.host.cross_models import CPU, build_cross, family_row
from tests.host.injection.weight_formats import quantised_state

# What every encoding passes in the model before the projections read it, and what is patched of it.
BETWEEN = {
    "anima": "llm_adapter.out_proj",
    "wan": "text_embedding.0",
    "pixart_sigma": "y_embedder.y_proj.fc1",
    "pixart_alpha": "y_embedder.y_proj.fc1",
    "ltxv": "caption_projection.linear_2",
}


def patched_between(small):
    """The same MODEL with a patch on what encodings pass in it."""
    model = small.model.clone()
    if small.name in BETWEEN:
        key = f"{PREFIX}{BETWEEN[small.name]}.weight"
        shape = small.model.model.state_dict()[key].shape
        change = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(5)) / shape[1]
        model.add_patches({key: ("diff", (change * shape[1] ** 0.5,))})
    return model


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "with a LoRA on what is between"])
def test_encodings_are_what_all_projections_are_given(small, patched):
    model = patched_between(small) if patched else small.model
    seen = small.given(SOURCE, model)
    assert len(seen) == sum(len(layer.modules) for layer in cross_attentions(model.model))
    first = next(iter(seen.values()))
    assert all(torch.equal(rows, first) for rows in seen.values())
    (prompt,) = small.encode([SOURCE], model)
    count = len(prompt.tokens)
    assert [word.text for word in words_of(prompt)] == SOURCE.split()
    close_to(prompt.encodings, first[:count])
    if small.name == "anima":
        # Behind the T5 tokens the adapter's output is filled up with zeros, which say nothing.
        assert not bool(first[count:].any())
    elif small.name != "ltxv":
        assert count == len(first)
    if patched and small.name in BETWEEN:
        (plain,) = small.encode([SOURCE])
        assert not torch.allclose(plain.encodings, prompt.encodings, atol=1e-2)


def test_tokens_that_a_model_does_not_look_at_are_left_out(smalls):
    small = smalls("ltxv")
    source, destination = small.encode([SOURCE, DESTINATION])
    assert len(source.tokens) == source.end + 1
    assert len(match_in_order(source, destination)) == len(source.tokens)
    # The others are there, and what they hold changes nothing.
    assert len(next(iter(small.given(SOURCE).values()))) > len(source.tokens)


def test_each_of_two_experts_is_edited_for_what_its_own_layers_read(smalls):
    low, high = smalls("wan"), build_cross("wan", seed=7)
    first, second = low.encode([SOURCE])[0], low.encode([SOURCE], high)[0]
    assert first.tokens == second.tokens
    assert not torch.allclose(first.encodings, second.encodings, atol=1e-2)
    edited, _ = assume(low, high)
    source, destination = low.encode([SOURCE, DESTINATION], high)
    matched = match_in_order(source, destination)[: source.end]
    old, new = weights_of(high), weights_of(edited)
    for key in low.edited_keys():
        change = formula(old[key], source.encodings[: source.end], destination.encodings[matched])
        close_to(new[key] - old[key], change)


def test_what_a_quantised_network_makes_of_encodings_is_what_its_weights_mean(smalls):
    small, plain = smalls("wan"), build_cross("wan")
    network = plain.model.diffusion_model
    stored, meant = quantised_state(network.state_dict(), "float8_e4m3fn", "text_embedding")
    network.load_state_dict(meant)
    config = small.row.config(dict(small.row.unet))
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    with torch.inference_mode():
        base = small.row.base(config, device=CPU)
        base.diffusion_model.load_state_dict(stored, strict=False)
    assert isinstance(base.diffusion_model.text_embedding[0].weight, QuantizedTensor)
    quantised = model_patcher.CoreModelPatcher(base, load_device=CPU, offload_device=CPU)
    (found,), (expected,) = (small.encode([SOURCE], model) for model in (quantised, plain))
    close_to(found.encodings, expected.encodings)
    (rounded,) = small.encode([SOURCE])
    assert not torch.allclose(rounded.encodings, expected.encodings, atol=1e-3)


def test_statistics_are_preserved_where_they_are_of_what_the_layers_read(small):
    entry = family_row(small.name).network.entry
    adapts = family_row(small.name).network.adapts
    captions = ["a small cat in a garden", "an old bag", "the white snow"]
    model = small.model if adapts else None
    statistics = measure_covariance(small.clip, captions, model=model)
    kept = preserve_prompts(small.clip, (), 1.0, statistics, 3e4)
    if entry is not None:
        with pytest.raises(ValueError, match=rf"sends that through `{entry}` before"):
            assume(small, preserve=kept)
        return
    rows = torch.cat([each.encodings[: each.end] for each in small.encode(captions)])
    old = weights_of(small.model)

    def drift(edited):
        new = weights_of(edited)
        return sum(float((rows @ (new[key] - old[key]).mT).norm()) for key in small.edited_keys())

    assert drift(assume(small, preserve=kept)[0]) < 0.5 * drift(assume(small)[0])


def test_the_clip_of_another_family_is_refused_with_both_named(small, smalls):
    other = smalls("wan" if small.name != "wan" else "ltxv")
    with pytest.raises(UnsupportedModelError, match=r"does not belong to .*expected the text enc"):
        PerfusionEditAssumption.execute(
            *(small.model, other.clip, SOURCE, DESTINATION),
            **{"augment": False, "with_padding": False, **SOLVING},
        )
