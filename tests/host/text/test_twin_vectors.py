"""What a placeholder stands for under twin lock, token for token."""

from __future__ import annotations

import pytest
import torch
from comfyui_perfusion.host.text.placeholders import serve_vectors
from comfyui_perfusion.host.text.twin_vectors import (
    served_rows,
    superclass_words,
    twin_seed,
    twin_vector,
)


def test_a_vector_is_fixed_by_placeholder_and_encoder_and_has_the_superclasss_norm():
    like = torch.randn(768, generator=torch.Generator().manual_seed(0)) * 0.02
    first = twin_vector("<bo>", "l", like)
    assert torch.equal(first, twin_vector("<bo>", "l", like))
    torch.testing.assert_close(first.norm(), like.norm())
    others = [twin_vector("<olli>", "l", like), twin_vector("<bo>", "g", like), like]
    for other in others:
        # Independent directions in 768 dimensions: 1 / sqrt(768) is 0.036.
        assert abs(torch.cosine_similarity(first, other, dim=0)) < 0.2
    torch.testing.assert_close(twin_vector("<bo>", "l", like * 3), first * 3)


def test_case_does_not_matter_as_placeholders_match_whatever_it_is():
    assert twin_seed("<Bo>", "l") == twin_seed("<bo>", "l")


def test_a_half_precision_row_gives_a_vector_in_full_precision():
    found = twin_vector("<bo>", "l", torch.ones(8, dtype=torch.float16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(), torch.tensor(8.0).sqrt())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("superclass", ["cat", "teddy bear", "birdbath", "birdbath stone lamp"])
def test_all_but_the_last_sub_word_are_the_superclasss_own(worlds, family, superclass):
    clip = worlds.clip(family)
    words = superclass_words(clip, superclass)
    vectors = {name: twin_vector("<bo>", name, each.rows[-1]) for name, each in words.items()}
    rows = served_rows(words, vectors)
    served = serve_vectors(clip, "<bo>", rows).tokenize("a <bo> here")
    stock = clip.tokenize(f"a {superclass} here")
    for name, each in words.items():
        count = len(each.tokens)
        ids = [token for token, _ in stock[name][0]]
        assert list(each.tokens) == ids[2 : 2 + count]
        found = [token for token, _ in served[name][0]]
        assert len(found) == len(ids)
        assert found[:2] + found[2 + count :] == ids[:2] + ids[2 + count :]
        encoder = getattr(clip.cond_stage_model, f"clip_{name}")
        table = encoder.transformer.get_input_embeddings().weight
        expected = [*table[list(each.tokens[:-1])], vectors[name]]
        for row, wanted in zip(found[2 : 2 + count], expected, strict=True):
            assert torch.equal(row, wanted)


def test_more_sub_words_than_a_tokenizer_keeps_together_are_refused(worlds):
    clip = worlds.clip("sd1")
    assert len(superclass_words(clip, "a b c d e f g")["l"].tokens) == 7
    with pytest.raises(ValueError, match=r"1 to 7 sub-words.*reads 8; use a shorter"):
        superclass_words(clip, "a b c d e f g h")
