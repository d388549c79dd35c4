"""Computing again instead of keeping: the same gradients from less memory; what needs none."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfyui_perfusion.host.models.families import UnsupportedModelError, encoder_models
from comfyui_perfusion.host.pictures.training_images import ImageOptions, encode_images
from comfyui_perfusion.host.training.checkpointing import checkpoint_blocks
from comfyui_perfusion.host.training.view import training_view
from comfyui_perfusion.perfusion import Covariance, TrainingConfig, train_concept

from tests.host.training_world import Kept, batch_of, edit_for, gradients, view_of


@pytest.fixture(scope="module", params=["sd1_light", "sdxl_light"])
def world(worlds, request):
    """A small model with its text encoders and VAE, and two pictures."""
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    return worlds.new_model(request.param), worlds.clip(request.param), worlds.vae(), images


def test_gradients_are_the_same_bit_for_bit(world):
    found = []
    for checkpointing in (False, True):
        with view_of(world, gradient_checkpointing=checkpointing) as view:
            found.append(gradients(view))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


def test_two_edits_computed_before_either_backward_pass_keep_apart(world):
    found = []
    for checkpointing in (False, True):
        with view_of(world, gradient_checkpointing=checkpointing) as view:
            encoded = view.encode(["a <thing>"], view.initial_embeddings())
            first, second = edit_for(view, encoded), edit_for(view, encoded)
            with torch.no_grad():
                for output in second.values.values():
                    output.mul_(-2)
            losses = [view.errors(batch_of(0), encoded, e).mean() for e in (first, None, second)]
            torch.stack([loss for loss in losses if loss.requires_grad]).sum().backward()
            found.append([value.grad for e in (first, second) for value in e.values.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    middle = len(found[0]) // 2
    assert not torch.equal(found[0][0], found[0][middle])


def test_much_less_is_kept_of_model_and_text(world):
    text, model = [], []
    for checkpointing in (False, True):
        with view_of(world, gradient_checkpointing=checkpointing) as view:
            vectors = {n: v.requires_grad_(True) for n, v in view.initial_embeddings().items()}
            with Kept(view.clip.cond_stage_model) as kept:
                encoded = view.encode(["a <thing>", "the <thing>"], vectors)
            text.append(kept.size)
            edit = edit_for(view, encoded)
            with Kept(view._model) as kept:
                view.errors(batch_of(0, 1), encoded, edit)
            model.append(kept.size)
    assert model[1] < 0.35 * model[0]
    assert text[1] < 0.35 * text[0]


def test_blocks_run_again_in_the_backward_pass_and_only_then(world):
    with view_of(world, gradient_checkpointing=True) as view:
        block = next(
            m for m in view._model.diffusion_model.modules() if isinstance(m, BasicTransformerBlock)
        )
        runs = []
        block.norm1.register_forward_hook(lambda *_: runs.append(view._current.edit))
        encoded = view.encode(["a <thing>"], view.initial_embeddings())
        edit = edit_for(view, encoded)
        loss = view.errors(batch_of(0), encoded, edit).mean()
        assert runs == [edit]
        assert view._current.edit is None
        loss.backward()
        assert runs == [edit, edit]
        assert view._current.edit is None
        with torch.no_grad():
            view.errors(batch_of(0), encoded, edit)
        assert len(runs) == 3


def test_an_interrupt_during_the_backward_pass_arrives(world):
    with view_of(world, gradient_checkpointing=True) as view:
        encoded = view.encode(["a <thing>"], view.initial_embeddings())
        loss = view.errors(batch_of(0), encoded, edit_for(view, encoded)).mean()
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            loss.backward()
        assert view._current.edit is None
    assert not comfy.model_management.in_training


def test_training_in_parts_is_the_same_run_with_and_without(world):
    model, clip, vae, images = world
    smaller = torch.rand(1, 32, 64, 3, generator=torch.Generator().manual_seed(1))
    pictures = encode_images(vae, [images, smaller], None, ImageOptions(flip=True))
    config = TrainingConfig(
        "<thing>", "mug", steps=2, batch_size=2, rows_at_once=1, templates=("a photo of a {}",)
    )
    runs = []
    for checkpointing in (False, True):
        with training_view(
            model, clip, pictures, "mug", "<thing>", gradient_checkpointing=checkpointing
        ) as view:
            width = view.encode_superclass(["a mug"]).encodings.shape[-1]
            identity = torch.eye(width, dtype=torch.float64)
            covariance = Covariance(identity, 1, 1, "words", view.encoder_hash)
            runs.append(train_concept(view, config, covariance))
    plain, recomputed = (run.concept for run in runs)
    assert runs[0].losses == runs[1].losses
    assert torch.equal(plain.i, recomputed.i)
    assert all(torch.equal(v, recomputed.embeddings[n]) for n, v in plain.embeddings.items())
    assert all(torch.equal(v, recomputed.o_v[n]) for n, v in plain.o_v.items())


def test_a_module_without_blocks_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"expected blocks of the kinds .*Linear"):
        checkpoint_blocks(torch.nn.Linear(2, 2))


def test_no_weight_of_the_private_copies_takes_gradients(world):
    with view_of(world) as view:
        modules = view._model, view.clip.cond_stage_model
        gradients(view)
        for module in modules:
            for name, parameter in module.named_parameters():
                assert not parameter.requires_grad, name
                assert parameter.grad is None, name


def test_nothing_before_the_first_that_reads_the_text_is_differentiated(world):
    with view_of(world) as view:
        unet = view._model.diffusion_model
        first = next(m for m in unet.modules() if isinstance(m, BasicTransformerBlock))
        names = ("input_blocks.0.0", "input_blocks.1.0", "time_embed", "out")
        watched = {name: unet.get_submodule(name) for name in names}
        watched |= {"attn1": first.attn1, "norm2": first.norm2, "attn2": first.attn2}
        found = {}
        for name, module in watched.items():
            module.register_forward_hook(
                lambda _, __, output, name=name: found.update({name: output.requires_grad})
            )
        gradients(view)
        pooled = view.family == "sdxl"
    # SDXL's blocks all read the pooled text, beside the time, from the second one on.
    assert found == {
        "input_blocks.0.0": False,
        "input_blocks.1.0": pooled,
        "time_embed": False,
        "attn1": pooled,
        "norm2": pooled,
        "attn2": True,
        "out": True,
    }


def test_without_gradients_to_take_nothing_is_kept(world):
    with view_of(world) as view:
        vectors = view.initial_embeddings()
        model = view.clip.cond_stage_model
        with Kept(model) as kept:
            encoded = view.encode(["a <thing>"], vectors)
            edit = edit_for(view, encoded, trainable=False)
            view.errors(batch_of(0), encoded, edit)
        assert kept.size == 0
        assert len(encoder_models(view.clip)) == len(vectors)
