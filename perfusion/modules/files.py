"""Concepts of wrapped networks in the concept file format, one small .safetensors each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from ..concept.concept import Concept
from ..concept.concept_file import load_concept, save_concept
from ..gated.gate import Gate
from .concept_inputs import ConceptInputs
from .embedding import EmbeddingWrapper
from .projections import Rank1EditModule


def concept_of(
    model: nn.Module,
    *,
    placeholder: str,
    superclass: str | None = None,
    concept_id: int = 0,
    family: str = "research",
    embedding: nn.Module | None = None,
    encoder: str = "l",
    metadata: Mapping[str, str] | None = None,
) -> Concept:
    """One concept of a wrapped ``model`` as a value.

    The concept's layers are named after the modules that hold the projections.

    Args:
        model: the wrapped network.
        placeholder: the word the concept gets.
        superclass: its everyday word; needed where the wrapper was not given it as a string.
        concept_id: which of the model's concepts.
        family: what kind of model it belongs to.
        embedding: the module that holds the `EmbeddingWrapper` where ``model`` does not.
        encoder: the name its vector gets.
        metadata: what else the concept says about itself.

    Raises:
        ValueError: for a model without edits or with several sets of inputs, a concept that was
            never trained, and no or several embeddings.
        IndexError: for a concept that does not exist.
    """
    values = _value_projections(model)
    inputs = _common_inputs(values)
    if not 0 <= concept_id < inputs.num_concepts:
        raise IndexError(f"concept_id: expected 0 to {inputs.num_concepts - 1}, found {concept_id}")
    for module in values.values():
        module.require_started((concept_id,))
    wrapper = _embedding(model if embedding is None else embedding)
    if concept_id >= wrapper.num_concepts:
        raise IndexError(
            f"concept_id: expected 0 to {wrapper.num_concepts - 1}, the embedding's, found "
            f"{concept_id}"
        )
    superclass = superclass or wrapper.superclass_strings[concept_id]
    if superclass is None:
        raise ValueError("superclass: expected its word, found none; pass superclass=")
    return Concept(
        family=family,
        placeholder=placeholder,
        superclass=superclass,
        embeddings={encoder: wrapper.concepts[concept_id].detach().cpu().clone()},
        i=inputs.i[concept_id].cpu().clone(),
        u=inputs.u[concept_id].cpu().clone(),
        superclass_encoding=inputs.superclass_encoding[concept_id].cpu().clone(),
        o_v={name: m.outputs((concept_id,))[0].detach().cpu() for name, m in values.items()},
        gate=Gate(*(round(value, 6) for value in inputs.gates[concept_id].tolist())),
        train_gate=inputs.train_gate,
        metadata=dict(metadata or {}),
    )


def save_modules(
    model: nn.Module,
    path: Path | str,
    *,
    placeholder: str,
    superclass: str | None = None,
    concept_id: int = 0,
    family: str = "research",
    embedding: nn.Module | None = None,
    encoder: str = "l",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write one concept of a wrapped model as a concept file; returns the path.

    Arguments and errors as in `concept_of` and `save_concept`.
    """
    concept = concept_of(
        model,
        placeholder=placeholder,
        superclass=superclass,
        concept_id=concept_id,
        family=family,
        embedding=embedding,
        encoder=encoder,
        metadata=metadata,
    )
    return save_concept(concept, path, dtype)


def load_modules(
    model: nn.Module,
    path: Path | str,
    *,
    concept_id: int = 0,
    embedding: nn.Module | None = None,
    encoder: str = "l",
) -> Concept:
    """Put a concept file into a wrapped model, as its concept ``concept_id``; returns the concept.

    C is not needed: the file has the dual. Nothing is changed unless everything fits.

    Raises:
        FileFormatError: for a file that cannot be read.
        ValueError: for layers, widths or encoders that do not fit (naming both sides).
        IndexError: for a concept the model has no room for.
    """
    concept = load_concept(path)
    values = _value_projections(model)
    inputs = _common_inputs(values)
    wrapper = _embedding(model if embedding is None else embedding)
    if not 0 <= concept_id < min(inputs.num_concepts, wrapper.num_concepts):
        raise IndexError(
            f"concept_id: expected 0 to {min(inputs.num_concepts, wrapper.num_concepts) - 1}, "
            f"the model's num_concepts, found {concept_id}"
        )
    if concept.o_k is not None:
        raise ValueError(f"{path}: expected keys locked to the superclass, found trained keys")
    ours = {name: module.linear.out_features for name, module in values.items()}
    if concept.layers != ours:
        raise ValueError(f"{path}: {_difference(ours, concept.layers)}")
    if concept.i.shape != (inputs.width,):
        raise ValueError(
            f"{path}: expected encodings of width {inputs.width}, the model's, found "
            f"{concept.i.shape[0]}"
        )
    vector = concept.embeddings.get(encoder)
    expected = (wrapper.concepts.shape[1],)
    if vector is None or vector.shape != expected:
        found = {name: tuple(tensor.shape) for name, tensor in concept.embeddings.items()}
        raise ValueError(f"{path}: expected an embedding '{encoder}' {expected}, found {found}")
    inputs.set(concept_id, concept.i, concept.superclass_encoding, concept.u, concept.gate)
    for name, module in values.items():
        module.set_outputs(concept_id, concept.o_v[name])
    with torch.no_grad():
        wrapper.concepts[concept_id] = vector.to(wrapper.concepts)
    return concept


def _value_projections(model: nn.Module) -> dict[str, Rank1EditModule]:
    """Path of the module that holds a value projection -> the projection."""
    found: dict[str, Rank1EditModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, Rank1EditModule) and module.concept_outputs is not None:
            holder = name.rpartition(".")[0] or "root"
            if holder in found:
                raise ValueError(
                    f"expected one value projection in {holder}, found several; wrap keys with "
                    "is_key_proj=True"
                )
            found[holder] = module
    if not found:
        raise ValueError(
            f"expected Rank1EditModules for values in {type(model).__name__}, found none; wrap "
            "its cross-attentions with make_key_value_proj_rank1_edit_modules_"
        )
    return found


def _common_inputs(values: Mapping[str, Rank1EditModule]) -> ConceptInputs:
    first, *others = [module.inputs for module in values.values()]
    if any(other is not first for other in others):
        raise ValueError(
            f"expected one ConceptInputs for all {len(values)} layers, found several; hand the "
            "inputs of the first wrapped attention on to the others"
        )
    return first


def _embedding(model: nn.Module) -> EmbeddingWrapper:
    found: Iterator[EmbeddingWrapper] = (
        module for module in model.modules() if isinstance(module, EmbeddingWrapper)
    )
    wrappers = list(found)
    if len(wrappers) != 1:
        raise ValueError(
            f"expected one EmbeddingWrapper in {type(model).__name__}, found {len(wrappers)}; "
            "pass the module that holds it as embedding="
        )
    return wrappers[0]


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    for name, size in ours.items():
        if name in theirs and theirs[name] != size:
            return f"layer {name}: expected {size} features, found {theirs[name]}"
    missing = sorted(set(ours) - set(theirs))
    unknown = sorted(set(theirs) - set(ours))
    return (
        f"expected the model's {len(ours)} layers, found {len(theirs)}; missing: "
        f"{', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}"
    )
