"""Token embeddings with learned vectors for concepts, for prompts written with ordinary words.

`EmbeddingWrapper` puts a concept's vector where a prompt has the superclass word, and gives the
same prompts with that word as well: the two encodings `Rank1EditModule` is trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .precision import moving_only
from .token_rows import Found, aligned, cut_to, occurrences, real_tokens

Tokenize = Callable[[list[str]], Tensor]


class EmbeddingReturn(NamedTuple):
    """What the wrappers return.

    Attributes:
        embed_with_concept: (B, N, dim).
        embed_with_superclass: the same prompts with the superclass word, where asked for.
        embed_mask: True at every token up to the end token and False at the padding.
        concept_indices: (B,), the concept's position in both encodings.
    """

    embed_with_concept: Tensor
    embed_with_superclass: Tensor | None
    embed_mask: Tensor
    concept_indices: Tensor | None


@dataclass(frozen=True, eq=False)
class PromptIds:
    """Token ids of prompts with the concept, and of the same prompts with the superclass word.

    Attributes:
        ids: (B, N), with a concept's id (vocabulary size + number) at its place.
        superclass_ids: (B, N), with the superclass's sub-words there.
        concept_indices: (B,), the place.
        extra: how many more sub-words there are than the concept's one token.
    """

    ids: Tensor
    superclass_ids: Tensor | None
    concept_indices: Tensor | None
    extra: int


class EmbeddingWrapper(nn.Module):
    """An `nn.Embedding` with ``num_concepts`` trainable vectors ``concepts`` (k, dim) beside it.

    The vectors stay in fp32 whatever the network is cast to. A concept starts at the mean of its
    superclass's sub-words; without a superclass at small random values.

    Args:
        embed: the embedding; it is frozen.
        num_concepts: k.
        superclass_embed_id: the id of the superclass word, or the ids of its sub-words.
        superclass_string: or the word itself.
        tokenize: a list of texts -> ids (B, N); open_clip's tokenizer unless given.
        tokenizer_pad_id: the id of padding.
        tokenizer_sos_eos_id: the ids of the start and the end token.

    Raises:
        ValueError: for a superclass that is no token at all or not in the vocabulary.
        ImportError: naming the remedy, when open_clip's tokenizer is needed and missing.
    """

    def __init__(
        self,
        embed: nn.Embedding,
        num_concepts: int = 1,
        superclass_embed_id: int | Sequence[int] | None = None,
        superclass_string: str | None = None,
        tokenize: Tokenize | None = None,
        tokenizer_pad_id: int = 0,
        tokenizer_sos_eos_id: tuple[int, int] = (49406, 49407),
    ) -> None:
        super().__init__()
        if superclass_embed_id is not None and superclass_string is not None:
            raise ValueError("expected superclass_embed_id or superclass_string, found both")
        named = superclass_embed_id is not None or superclass_string is not None
        if num_concepts < 1 or (named and num_concepts > 1):
            raise ValueError(
                f"num_concepts: expected 1 with a superclass (use merge_embedding_wrappers for "
                f"several), else at least 1, found {num_concepts}"
            )
        if tokenize is None and superclass_string is not None:
            tokenize = open_clip_tokenizer()
        self.embed = embed.requires_grad_(False)
        self.tokenize = tokenize
        self.pad_id = tokenizer_pad_id
        self.sos_id, self.eos_id = tokenizer_sos_eos_id
        self.superclass_strings: list[str | None] = [superclass_string] * num_concepts
        self.superclass_ids: list[tuple[int, ...]] = [()] * num_concepts
        start = 0.02 * torch.randn(num_concepts, embed.embedding_dim)
        if superclass_string is not None:
            self.superclass_ids = [self._ids_of(superclass_string)]
        elif superclass_embed_id is not None:
            one = isinstance(superclass_embed_id, int)
            self.superclass_ids = [(superclass_embed_id,) if one else tuple(superclass_embed_id)]
        if named:
            ids = self.superclass_ids[0]
            if not ids or not all(0 <= token < self.num_embeds for token in ids):
                raise ValueError(
                    f"superclass: expected ids from 0 to {self.num_embeds - 1}, the embedding's, "
                    f"found {ids}"
                )
            # The average of the sub-words, so that "birdbath" starts between bird and bath.
            start = embed.weight[list(ids)].detach().float().mean(0, keepdim=True)
        self.concepts = nn.Parameter(start.to(embed.weight.device, torch.float32))

    @property
    def num_embeds(self) -> int:
        """Size of the vocabulary; the id of concept c is this plus c."""
        return self.embed.num_embeddings

    @property
    def num_concepts(self) -> int:
        """k."""
        return self.concepts.shape[0]

    @property
    def concept_embed_ids(self) -> tuple[int, ...]:
        """The token ids of the concepts, for prompts handed over as ids."""
        return tuple(range(self.num_embeds, self.num_embeds + self.num_concepts))

    def forward(
        self,
        x: Tensor | Sequence[str],
        concept_id: int | tuple[int, ...] | None = None,
        return_embed_with_superclass: bool | None = None,
        clip_transformer_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> EmbeddingReturn:
        """Embeddings of prompts with the concept, and with its superclass in the same place.

        Args:
            x: texts, in which the superclass word becomes the concept, or ids (B, N) with
                `concept_embed_ids`.
            concept_id: which concepts may appear (all of them; in training concept 0).
            return_embed_with_superclass: the superclass embeddings and the indices come in
                training, and in eval mode where this is True.
            clip_transformer_fn: (B, N, dim) -> (B, N, D), applied to both.

        Raises:
            ValueError: for a prompt that does not hold the concept exactly once (naming it) where
                that is needed, and for a superclass of several sub-words without
                ``clip_transformer_fn``: only encodings can be put into line with those of the
                shorter prompt.
            IndexError: for concepts that do not exist.
        """
        tokens = self.tokens(x, concept_id, return_embed_with_superclass)
        if tokens.extra and clip_transformer_fn is None:
            raise ValueError(
                f"the superclass has {tokens.extra + 1} sub-words and the concept one token: "
                "expected clip_transformer_fn (or OpenClipEmbedWrapper), which encodes both "
                "prompts so that concept_indices can hold for both, found none"
            )
        encode = clip_transformer_fn or (lambda embeds: embeds)
        superclass = None
        if tokens.superclass_ids is not None:
            with torch.no_grad():
                superclass = encode(self.vectors(tokens.superclass_ids))
        return self.returned(tokens, encode(self.vectors(tokens.ids)), superclass)

    def returned(
        self, tokens: PromptIds, encodings: Tensor, superclass: Tensor | None
    ) -> EmbeddingReturn:
        """The four results, the superclass's encodings put into line with the concept's."""
        if superclass is not None and tokens.concept_indices is not None:
            superclass = aligned(superclass, tokens.concept_indices, tokens.extra)
        mask = real_tokens(tokens.ids, self.pad_id, self.eos_id)
        return EmbeddingReturn(encodings, superclass, mask, tokens.concept_indices)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EmbeddingWrapper:
        super()._apply(moving_only(fn, [self.concepts]), recurse)
        return self

    def vectors(self, ids: Tensor) -> Tensor:
        """Embeddings (B, N, dim) of ids (B, N); only the concepts' own carry gradients."""
        with torch.no_grad():
            embeds = self.embed(ids.masked_fill(ids >= self.num_embeds, 0))
        for concept, token in zip(self.concepts, self.concept_embed_ids, strict=True):
            place = rearrange(ids == token, "... -> ... 1")
            embeds = torch.where(place, concept.to(embeds), embeds)
        return embeds

    def tokens(
        self,
        x: Tensor | Sequence[str],
        concept_id: int | tuple[int, ...] | None = None,
        with_superclass: bool | None = None,
    ) -> PromptIds:
        """Token ids of prompts; arguments and errors as in `forward`."""
        ids = self._checked_concepts(concept_id)
        with_superclass = self.training if with_superclass is None else with_superclass
        single = len(ids) == 1 and bool(self.superclass_ids[ids[0]])
        if with_superclass and not single:
            raise ValueError(
                f"expected one concept with a superclass to give prompts of the superclass for, "
                f"found concepts {ids}; pass concept_id, or return_embed_with_superclass=False"
            )
        rows, texts = self._rows(x)
        words = {c: self.superclass_ids[c] if texts else (self.num_embeds + c,) for c in ids}
        if texts:
            self._refuse_ambiguity(ids)
        found = [occurrences(row, words) for row in rows]
        if with_superclass:
            self._require_once(ids[0], found, rows, texts)
        width = len(rows[0])
        concept_rows = [
            cut_to(width, one.replaced(lambda c: (self.num_embeds + c,)), self.pad_id, self.eos_id)
            for one in found
        ]
        device = self.concepts.device
        tokens = torch.tensor(concept_rows, device=device)
        if not with_superclass:
            return PromptIds(tokens, None, None, 0)
        superclass_rows = [
            cut_to(width, one.replaced(self.superclass_ids.__getitem__), self.pad_id, self.eos_id)
            for one in found
        ]
        places = torch.tensor([one.places[0][0] for one in found], device=device)
        extra = len(self.superclass_ids[ids[0]]) - 1
        if int(places.max()) + extra >= width:
            raise ValueError(
                f"expected room for the {extra + 1} sub-words of the superclass within {width} "
                f"tokens, found the concept at position {int(places.max())}; shorten the prompt"
            )
        return PromptIds(tokens, torch.tensor(superclass_rows, device=device), places, extra)

    def _rows(self, x: Tensor | Sequence[str]) -> tuple[list[list[int]], list[str]]:
        """Prompts as rows of ids, and their texts ([] where ids were given)."""
        if isinstance(x, Tensor):
            ids, texts = x, []
        else:
            texts = [x] if isinstance(x, str) else list(x)
            if self.tokenize is None:
                raise ValueError(
                    "expected prompts as token ids, found texts; pass tokenize= to "
                    "EmbeddingWrapper to use texts"
                )
            ids = self.tokenize(texts)
        wanted = ids.ndim == 2 and ids.shape[0] > 0 and not ids.is_floating_point()
        highest = self.num_embeds + self.num_concepts - 1
        if not wanted or not 0 <= int(ids.min()) <= int(ids.max()) <= highest:
            raise ValueError(
                f"expected token ids (B, N) from 0 to {highest}, found {tuple(ids.shape)} "
                f"{ids.dtype}" + (f" up to {int(ids.max())}" if ids.numel() else "")
            )
        return ids.tolist(), texts

    def _ids_of(self, word: str) -> tuple[int, ...]:
        assert self.tokenize is not None
        special = (self.pad_id, self.sos_id, self.eos_id)
        ids = tuple(t for t in self.tokenize([word])[0].tolist() if t not in special)
        if not ids:
            raise ValueError(f"superclass_string: expected a word, found {word!r} without tokens")
        return ids

    def _checked_concepts(self, concept_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
        if concept_id is None:
            concept_id = 0 if self.training else tuple(range(self.num_concepts))
        ids = (concept_id,) if isinstance(concept_id, int) else tuple(concept_id)
        if len(set(ids)) != len(ids) or not ids:
            raise ValueError(f"concept_id: expected different concepts, found {ids}")
        for one in ids:
            if not 0 <= one < self.num_concepts:
                raise IndexError(f"concept_id: expected 0 to {self.num_concepts - 1}, found {one}")
        return ids

    def _refuse_ambiguity(self, ids: tuple[int, ...]) -> None:
        words = [self.superclass_ids[c] for c in ids if self.superclass_ids[c]]
        if len(set(words)) != len(words):
            raise ValueError(
                "two concepts have the same superclass word, so that a text does not say which "
                "is meant: pass concept_id, or token ids with concept_embed_ids"
            )

    def _require_once(
        self, concept: int, found: Sequence[Found], rows: list[list[int]], texts: list[str]
    ) -> None:
        word = self.superclass_strings[concept] if texts else None
        for number, one in enumerate(found):
            if len(one.places) != 1:
                prompt = repr(texts[number]) if texts else f"row {number}"
                named = repr(word) if word else f"the id of concept {concept}"
                raise ValueError(
                    f"expected {named} once in every prompt, found it {len(one.places)} times in "
                    f"{prompt} (prompts are cut after {len(rows[0])} tokens)"
                )


def merge_embedding_wrappers(*wrappers: EmbeddingWrapper) -> EmbeddingWrapper:
    """One wrapper, in eval mode, with the concepts of several over the same embedding.

    Raises:
        ValueError: for none and for embeddings of different shapes (naming them).
    """
    if not wrappers:
        raise ValueError("expected at least one wrapper to merge, found none")
    shapes = [tuple(wrapper.embed.weight.shape) for wrapper in wrappers]
    if len(set(shapes)) != 1:
        raise ValueError(f"expected wrappers of one embedding, found shapes {shapes}")
    first = wrappers[0]
    merged = EmbeddingWrapper(
        first.embed,
        num_concepts=sum(wrapper.num_concepts for wrapper in wrappers),
        tokenize=first.tokenize,
        tokenizer_pad_id=first.pad_id,
        tokenizer_sos_eos_id=(first.sos_id, first.eos_id),
    )
    merged.superclass_strings = [s for wrapper in wrappers for s in wrapper.superclass_strings]
    merged.superclass_ids = [ids for wrapper in wrappers for ids in wrapper.superclass_ids]
    with torch.no_grad():
        merged.concepts.copy_(torch.cat([wrapper.concepts for wrapper in wrappers]))
    return merged.eval()


def open_clip_tokenizer(context_length: int = 77) -> Tokenize:
    """open_clip's tokenizer.

    Raises:
        ImportError: with the remedy, where it is not installed.
    """
    try:
        from open_clip import tokenizer
    except ImportError as error:
        raise ImportError(
            "open_clip's tokenizer is needed for texts: expected the package open-clip-torch, "
            "found none; install it (pip install open-clip-torch) or pass tokenize="
        ) from error
    return lambda texts: tokenizer.tokenize(texts, context_length=context_length)
