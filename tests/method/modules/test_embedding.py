"""Concept vectors among token embeddings, and in a real open_clip text encoder."""

from __future__ import annotations

import builtins

import open_clip
import pytest
import torch
from open_clip import tokenizer
from torch import Tensor, nn

from perfusion import (
    EmbeddingWrapper,
    OpenClipEmbedWrapper,
    calculate_input_covariance,
    merge_embedding_wrappers,
)
from perfusion.modules.open_clip import encode_tokens
from perfusion.modules.token_rows import occurrences, real_tokens

PROMPTS = ["a portrait of dog", "dog running through a green field", "a man walking his dog"]
DIM, VOCABULARY = 32, 49408
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"width": DIM, "heads": 4, "layers": 2, "vocab_size": VOCABULARY}


@pytest.fixture(scope="module")
def table() -> nn.Embedding:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Embedding(VOCABULARY, DIM)


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP", "without causal mask"])
def clip(request) -> nn.Module:
    """Models of open_clip's classes with random weights, all of them large enough to matter."""
    text = {**TEXT, "no_causal_mask": request.param == "without causal mask"}
    kind = open_clip.CLIP if request.param == "CLIP" else open_clip.CustomTextCLIP
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = kind(embed_dim=16, vision_cfg=VISION, text_cfg=text)
    tower = getattr(model, "text", model)
    for parameter in (tower.positional_embedding, tower.token_embedding.weight):
        parameter.data.mul_(20)
    return model.eval()


def own_encode(clip: nn.Module, ids: Tensor, concept: Tensor | None = None) -> Tensor:
    """open_clip's encoding written out; ``concept`` takes the place of token 1929 ("dog")."""
    tower = getattr(clip, "text", clip)
    embeds = tower.token_embedding(ids)
    if concept is not None:
        embeds = torch.where((ids == 1929)[..., None], concept, embeds)
    hidden = embeds + tower.positional_embedding
    return tower.ln_final(tower.transformer(hidden, attn_mask=tower.attn_mask))


def test_the_usage_of_the_projects_front_page_runs():
    embed = nn.Embedding(49408, 512)
    wrapped_embed = EmbeddingWrapper(embed, superclass_string="dog")
    embeds, superclass, mask, indices = wrapped_embed(
        [
            "a portrait of dog",
            "dog running through a green field",
            "a man walking his dog",
        ]
    )
    assert embeds.shape == superclass.shape == (3, 77, 512)
    assert mask.shape == (3, 77)
    assert mask.dtype == torch.bool
    assert indices.tolist() == [4, 1, 5]


def test_a_concept_starts_at_its_superclass_and_moves_alone(table):
    wrapped = EmbeddingWrapper(table, superclass_string="dog")
    ids = tokenizer.tokenize(PROMPTS)
    found = wrapped(PROMPTS)
    torch.testing.assert_close(found.embed_with_concept, table(ids))
    torch.testing.assert_close(found.embed_with_superclass, table(ids))
    with torch.no_grad():
        wrapped.concepts += 1
    moved = wrapped(PROMPTS)
    torch.testing.assert_close(moved.embed_with_superclass, table(ids))
    places = torch.zeros(3, 77, dtype=torch.bool)
    places[torch.arange(3), moved.concept_indices] = True
    changed = (moved.embed_with_concept != table(ids)).any(-1)
    assert torch.equal(changed, places)


def test_only_the_concept_gets_gradients(table):
    wrapped = EmbeddingWrapper(table, superclass_string="dog")
    wrapped(PROMPTS).embed_with_concept.square().sum().backward()
    assert [name for name, p in wrapped.named_parameters() if p.requires_grad] == ["concepts"]
    assert float(wrapped.concepts.grad.abs().max()) > 0
    assert table.weight.grad is None


def test_the_mask_covers_the_tokens_up_to_the_end_whatever_the_padding():
    clip_ids = torch.tensor([[49406, 0, 7, 49407, 0, 0], [49406, 5, 6, 7, 8, 49407]])
    expected = torch.tensor([[True, True, True, True, False, False], [True] * 6])
    assert torch.equal(real_tokens(clip_ids, 0, 49407), expected)
    padded_with_end = clip_ids.masked_fill(~expected, 49407)
    assert torch.equal(real_tokens(padded_with_end, 49407, 49407), expected)
    without_end = torch.tensor([[4, 5, 0, 0]])
    assert real_tokens(without_end, 0, 49407).tolist() == [[True, True, False, False]]


def test_the_longer_of_two_words_at_one_place_is_meant():
    found = occurrences([9, 1, 2, 9, 1, 9], {0: (1,), 1: (1, 2), 2: ()})
    assert found.places == ((1, 1), (3, 0))
    assert found.replaced({0: (50,), 1: (60, 61)}.__getitem__) == [9, 60, 61, 9, 50, 9]


def test_a_superclass_that_is_missing_or_there_twice_is_refused_with_its_prompt(table):
    wrapped = EmbeddingWrapper(table, superclass_string="dog")
    with pytest.raises(ValueError, match=r"'dog' once in every prompt, found it 0 .*'a cat'"):
        wrapped(["a dog", "a cat"])
    with pytest.raises(ValueError, match=r"2 times in 'a dog and a dog'"):
        wrapped(["a dog and a dog"])
    with pytest.raises(ValueError, match="cut after 77 tokens"):
        wrapped(["very " * 100 + "dog"])
    found = wrapped.eval()(["a cat", "a dog and a dog"])
    assert found.embed_with_superclass is None
    assert found.concept_indices is None


def test_several_sub_words_start_at_their_mean_and_need_the_encoder(table):
    wrapped = EmbeddingWrapper(table, superclass_string="birdbath")
    ids = tokenizer.tokenize(["birdbath"])[0, 1:3]
    assert wrapped.superclass_ids == [tuple(ids.tolist())]
    torch.testing.assert_close(wrapped.concepts[0].detach(), table(ids).mean(0))
    with pytest.raises(ValueError, match=r"2 sub-words .*clip_transformer_fn"):
        wrapped(["a birdbath in the garden"])
    found = wrapped(["a birdbath in the garden"], clip_transformer_fn=lambda embeds: 2 * embeds)
    whole = 2 * table(tokenizer.tokenize(["a birdbath in the garden"]))[0]
    assert found.concept_indices.tolist() == [2]
    # "bird" is left out, so that "bath", which has seen the whole word, stands at the index.
    torch.testing.assert_close(found.embed_with_superclass[0, :-1], whole[[0, 1, *range(3, 77)]])
    torch.testing.assert_close(found.embed_with_concept[0, 3:-1], whole[4:])
    assert int(found.embed_mask.sum()) == 7


def test_texts_and_ids_mean_the_same(table):
    wrapped = EmbeddingWrapper(table, superclass_string="dog")
    ids = tokenizer.tokenize(PROMPTS)
    ids = torch.where(ids == 1929, wrapped.concept_embed_ids[0], ids)
    for one, other in zip(wrapped(PROMPTS), wrapped(ids), strict=True):
        torch.testing.assert_close(one, other)


def test_merged_concepts_are_each_found_by_their_word_or_id(table):
    dog, cat = (EmbeddingWrapper(table, superclass_string=word) for word in ("dog", "cat"))
    with torch.no_grad():
        dog.concepts += 1
        cat.concepts -= 1
    merged = merge_embedding_wrappers(dog, cat)
    found = merged(["a dog with a cat"]).embed_with_concept[0]
    torch.testing.assert_close(found[2], dog.concepts[0])
    torch.testing.assert_close(found[5], cat.concepts[0])
    only_cat = merged(["a dog with a cat"], concept_id=1).embed_with_concept[0]
    torch.testing.assert_close(only_cat[2], table.weight[1929])
    by_id = merged(torch.tensor([[VOCABULARY + 1, VOCABULARY]])).embed_with_concept[0]
    torch.testing.assert_close(by_id, torch.cat([cat.concepts, dog.concepts]))
    twins = merge_embedding_wrappers(dog, dog)
    with pytest.raises(ValueError, match="same superclass word"):
        twins(["a dog"])
    twins(["a dog"], concept_id=1)


def test_unusable_tokens_concepts_and_settings_are_refused(table):
    wrapped = EmbeddingWrapper(table, superclass_embed_id=1929)
    with pytest.raises(ValueError, match=r"expected prompts as token ids.*tokenize="):
        wrapped(["a dog"])
    with pytest.raises(ValueError, match=r"from 0 to 49408, found \(1, 1\).*up to 60000"):
        wrapped(torch.tensor([[60000]]))
    with pytest.raises(ValueError, match=r"\(B, N\).*found \(3,\)"):
        wrapped(torch.tensor([1, 2, 3]))
    with pytest.raises(IndexError, match="expected 0 to 0, found 1"):
        wrapped(torch.tensor([[VOCABULARY]]), concept_id=1)
    with pytest.raises(ValueError, match=r"superclass: .*found \(60000,\)"):
        EmbeddingWrapper(table, superclass_embed_id=60000)
    with pytest.raises(ValueError, match="found both"):
        EmbeddingWrapper(table, superclass_embed_id=1, superclass_string="dog")
    with pytest.raises(ValueError, match="num_concepts: expected 1 with a superclass"):
        EmbeddingWrapper(table, num_concepts=2, superclass_string="dog")
    with pytest.raises(ValueError, match="found '' without tokens"):
        EmbeddingWrapper(table, superclass_string="")


def test_without_open_clip_the_error_names_the_package_and_the_other_way(table, monkeypatch):
    original = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name == "open_clip":
            raise ImportError("No module named 'open_clip'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"open-clip-torch.*pass tokenize="):
        EmbeddingWrapper(table, superclass_string="dog")
    wrapped = EmbeddingWrapper(table, superclass_string="dog", tokenize=tokenizer.tokenize)
    assert wrapped(PROMPTS).concept_indices.tolist() == [4, 1, 5]


def test_a_whole_open_clip_model_is_wrapped_as_on_the_projects_front_page(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="dog")
    text_enc, superclass_enc, mask, indices = wrapped(PROMPTS)
    assert text_enc.shape == superclass_enc.shape == (3, 77, DIM)
    assert mask.shape == (3, 77)
    assert indices.tolist() == [4, 1, 5]


def test_without_a_concept_the_encoding_is_open_clips_own(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="dog").eval()
    prompts = ["a photo of the sea", ""]
    ids = tokenizer.tokenize(prompts)
    encodings = wrapped(prompts).embed_with_concept
    torch.testing.assert_close(encodings, own_encode(clip, ids))
    pooled = encodings[torch.arange(2), ids.argmax(-1)]
    tower = getattr(clip, "text", clip)
    torch.testing.assert_close(pooled @ tower.text_projection, clip.encode_text(ids))


def test_with_a_concept_positions_mask_and_norm_are_open_clips_own(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="dog")
    with torch.no_grad():
        wrapped.wrapped_embed.concepts.copy_(20 * torch.randn(1, DIM))
    ids = tokenizer.tokenize(PROMPTS)
    found = wrapped(PROMPTS)
    concept = wrapped.wrapped_embed.concepts[0]
    torch.testing.assert_close(found.embed_with_concept, own_encode(clip, ids, concept))
    torch.testing.assert_close(found.embed_with_superclass, own_encode(clip, ids))
    # The comparison means something: each part of the encoder changes the result.
    tower = getattr(clip, "text", clip)
    bare = tower.ln_final(tower.transformer(wrapped.wrapped_embed.vectors(ids)))
    assert float((bare - found.embed_with_superclass).detach().abs().max()) > 0.5


def test_the_concept_gets_gradients_through_the_encoder_and_the_encoder_none(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="dog")
    wrapped(PROMPTS).embed_with_concept.square().sum().backward()
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trainable == ["wrapped_embed.concepts"]
    assert float(wrapped.wrapped_embed.concepts.grad.abs().max()) > 0
    assert all(p.grad is None for p in clip.parameters())


def test_a_superclass_of_several_sub_words_is_encoded_whole_and_put_into_line(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="birdbath")
    prompt = "a birdbath in the garden"
    found = wrapped([prompt])
    whole = own_encode(clip, tokenizer.tokenize([prompt]))[0]
    assert found.concept_indices.tolist() == [2]
    torch.testing.assert_close(found.embed_with_superclass[0, 2], whole[3])
    assert found.embed_with_concept.shape == found.embed_with_superclass.shape


def test_hooks_are_gone_after_every_call_even_a_failing_one(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="dog")
    wrapped(PROMPTS)
    with pytest.raises(RuntimeError):
        encode_tokens(clip, tokenizer.tokenize(PROMPTS)[:, :5], torch.randn(3, 4, DIM))
    tower = getattr(clip, "text", clip)
    assert not tower.token_embedding._forward_hooks
    assert not tower.ln_final._forward_hooks


def test_a_model_without_a_text_tower_of_open_clips_is_refused(clip):
    with pytest.raises(TypeError, match=r"encode_text, token_embedding.*found Linear"):
        OpenClipEmbedWrapper(nn.Linear(2, 2), superclass_string="dog")
    with pytest.raises(TypeError, match="and norm, found"):
        OpenClipEmbedWrapper(clip, superclass_string="dog", ln_final_path="norm")


def rounding(rows: Tensor, summands: int) -> float:
    """How far products of two fp32 encodings may be off, each computed from sums this long."""
    largest = float(rows.abs().max())
    return 2 * largest**2 * summands**0.5 * torch.finfo(torch.float32).eps


def test_the_covariance_counts_words_and_ends_of_all_captions(clip):
    wrapped = OpenClipEmbedWrapper(clip, superclass_string="dog")
    captions = [f"{PROMPTS[n % 3]} number {n}" for n in range(7)]
    found = calculate_input_covariance(wrapped, captions, batch_size=3)
    ids = tokenizer.tokenize(captions)
    rows = own_encode(clip, ids)[(ids != 0) & (ids != 49406)].detach().double()
    # The encodings are fp32 and batched otherwise: each entry is a mean of products of two, whose
    # rounding grows with the widest sum on the way to an encoding, the norm's and the MLP's.
    bound = rounding(rows, 4 * rows.shape[1])
    torch.testing.assert_close(found.matrix, rows.mT @ rows / len(rows), rtol=0, atol=bound)
    assert (found.tokens, found.captions, found.positions) == (len(rows), 7, "words")
    by_function = calculate_input_covariance(wrapped.embed_texts, captions)
    torch.testing.assert_close(by_function.matrix, found.matrix, rtol=0, atol=bound)
    with pytest.raises(ValueError, match="a list of captions, found none"):
        calculate_input_covariance(wrapped, [])
    with pytest.raises(ValueError, match="a list of captions, found one"):
        calculate_input_covariance(wrapped, "a dog")
