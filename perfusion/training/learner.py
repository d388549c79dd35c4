"""What is learned of a concept, and one optimiser step of it (Perfusion, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from ..gated.key_lock import locked_outputs
from ..gated.rank_one import Basis, Direction, GatedProjections, combine, gated_inputs
from ..text.prompts import fill
from .config import TrainingConfig
from .denoiser import Batch, Conditioning, Denoiser
from .losses import image_losses

_FIRST_SCALE = 2.0**16
_STEPS_TO_RAISE_SCALE = 200


class TrainingError(Exception):
    """Why training cannot go on from here; what was learned before is good."""


class Learner:
    """Token vectors, outputs, their optimiser and the followed input of one run."""

    def __init__(self, denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
        self.denoiser = denoiser
        self.config = config
        self.covariance = covariance
        encoding = _superclass_encoding(denoiser, config)
        self.superclass_encoding = encoding
        self.i = encoding.to("cpu", torch.float64)
        covariance.dual(self.i)  # a covariance of another width is an error before any work
        layers = denoiser.layers
        keys = locked_outputs(lambda layer, e: denoiser.project(layer, "k", e), layers, encoding)
        values = locked_outputs(lambda layer, e: denoiser.project(layer, "v", e), layers, encoding)
        self.edits = config.mode != "textual_inversion"
        self.embeddings = _parameters(denoiser.initial_embeddings(), True)
        self.values = _parameters(values, self.edits)
        self.keys = _parameters(keys, config.mode == "trained_keys")
        outputs = [p for p in (*self.values.values(), *self.keys.values()) if p.requires_grad]
        groups = [{"params": [*self.embeddings.values()], "lr": config.embedding_learning_rate}]
        if outputs:
            groups.append({"params": outputs, "lr": config.learning_rate})
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.scale = _FIRST_SCALE if denoiser.needs_scaling else 1.0
        self.since_scaled = 0

    def step(self, batch: Batch, prompts: Sequence[str], rows_at_once: int, rate: float) -> Tensor:
        """One optimiser step at ``rate`` times the learning rates; the rows' losses (B,) fp32.

        At most ``rows_at_once`` rows, all of one shape, are computed together; their gradients
        add up, so the step is the same for any number.

        Raises:
            TrainingError: when NaN or infinity appears; parameters may then be spoiled.
        """
        losses, order = self._backward(batch, self._encode(prompts), rows_at_once)
        # Only fp16 is scaled: the same rows once more, with gradients fp16 can hold.
        while self.scale > 1.0 and not _read(losses, self._gradients())[1]:
            self.scale, self.since_scaled = self.scale / 2, 0
            losses, order = self._backward(batch, self._encode(prompts, follow=False), rows_at_once)
        if self.scale != 1.0:
            for gradient in self._gradients():
                gradient /= self.scale
        for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = full * rate
        self.optimizer.step()
        trained = [parameter.detach() for parameter in self._trained()]
        found, finite = _read(losses, [*self._gradients(), *trained])
        if not finite:
            raise TrainingError("it made NaN or infinity; try a smaller learning rate")
        self.since_scaled += 1
        if self.denoiser.needs_scaling and self.since_scaled >= _STEPS_TO_RAISE_SCALE:
            self.scale, self.since_scaled = self.scale * 2, 0
        return torch.empty_like(found).index_copy_(0, order, found)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that a step changes, on their own devices, for `restore`."""
        found = {f"learned.{name}": p.detach().clone() for name, p in self._named()}
        for name, parameter in self._named():
            state = self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                found[f"adam.{key}.{name}"] = value.detach().clone()
        return found | {"i": self.i}

    def restore(self, tensors: Mapping[str, Tensor], scale: float, since_scaled: int) -> None:
        """Go back (or forth) to what `tensors` returned.

        Raises:
            ValueError: when something is missing or has another shape.
        """
        moments = ("step", "exp_avg", "exp_avg_sq")
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(_expected(tensors, f"learned.{name}", parameter))
                if not parameter.requires_grad or f"adam.step.{name}" not in tensors:
                    self.optimizer.state.pop(parameter, None)
                    continue
                state = {}
                for key in moments:
                    like = torch.zeros(()) if key == "step" else parameter.detach()
                    stored = _expected(tensors, f"adam.{key}.{name}", like)
                    state[key] = stored.to(like.device, torch.float32, copy=True)
                self.optimizer.state[parameter] = state
        self.i = _expected(tensors, "i", self.i).to("cpu", torch.float64, copy=True)
        self.scale, self.since_scaled = scale, since_scaled

    def _encode(self, prompts: Sequence[str], follow: bool = True) -> Conditioning:
        """Prompts encoded for this step; ``follow`` moves i, which happens once for each step."""
        self.optimizer.zero_grad()
        different = list(dict.fromkeys(prompts))
        with torch.enable_grad():
            encoded = self.denoiser.encode(different, self.embeddings)
            if len(different) < len(prompts):
                encoded = encoded.rows(torch.tensor([different.index(p) for p in prompts]))
        if follow:
            newest = last_marked(encoded, prompts, self.config.placeholder).detach().mean(0)
            newest = newest.to("cpu", torch.float64)
            if not bool(torch.isfinite(newest).all()):
                raise TrainingError("its text encoding holds NaN or infinity")
            self.i = self.config.ema * self.i + (1 - self.config.ema) * newest
        return encoded

    def _backward(
        self, batch: Batch, encoded: Conditioning, rows_at_once: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss, times the scale, in every parameter.

        Returns the losses (B,) fp32 where they were made, and which row of the batch each is of.
        """
        config, size = self.config, len(batch.indices)
        losses: list[Tensor] = []
        basis = self._basis(encoded.encodings) if self.edits else None
        parts = list(self._parts(batch, rows_at_once))
        with torch.enable_grad():
            for number, chosen in enumerate(parts, 1):
                whole = len(parts) == 1
                rows = batch if whole else batch.rows(chosen)
                text = encoded if whole else encoded.rows(chosen)
                edit = None if basis is None else self._edit(text, basis)
                errors = self.denoiser.errors(rows, text, edit)
                found = image_losses(
                    errors, self.denoiser.masks(rows), config.background, config.normalisation
                )
                # The graph of the text is used by every part.
                (found.sum() * (self.scale / size)).backward(retain_graph=number < len(parts))
                losses.append(found.detach().float())
        self._check_gradients()
        return torch.cat(losses), torch.cat(parts)

    def _parts(self, batch: Batch, rows_at_once: int) -> Iterator[Tensor]:
        """Rows (n,) that are computed together: of one shape, at most ``rows_at_once``."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for row, index in enumerate(batch.indices.tolist()):
            shapes.setdefault(self.denoiser.shape(index), []).append(row)
        for rows in shapes.values():
            yield from torch.tensor(rows).split(rows_at_once)

    def _basis(self, encodings: Tensor) -> Basis:
        """The edit's direction of this step, where the encodings are."""
        direction = Direction(
            i=self.i,
            u=self.covariance.dual(self.i),
            gate=self.config.gate,
            name=self.config.placeholder,
        )
        dtype = torch.promote_types(encodings.dtype, torch.float32)
        return combine([direction]).to(encodings.device, dtype)

    def _edit(self, encoded: Conditioning, basis: Basis) -> GatedProjections:
        inputs, gates = gated_inputs(encoded.encodings, basis)
        keys = {layer: output[None] for layer, output in self.keys.items()}
        values = {layer: output[None] for layer, output in self.values.items()}
        return GatedProjections(inputs, gates, keys, values)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for kind, tensors in (("embedding", self.embeddings), ("v", self.values), ("k", self.keys)):
            for name, parameter in tensors.items():
                yield f"{kind}.{name}", parameter

    def _trained(self) -> list[Tensor]:
        return [parameter for _, parameter in self._named() if parameter.requires_grad]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained() if p.grad is not None]

    def _check_gradients(self) -> None:
        words = {"embedding": "the embedding", "v": "the value output of", "k": "the key output of"}
        for name, parameter in self._named():
            if parameter.requires_grad and parameter.grad is None:
                kind, _, rest = name.partition(".")
                raise ValueError(
                    f"{words[kind]} {rest}: expected the loss to depend on it, found no gradient; "
                    "the model did not use it, so it cannot be trained"
                )


def last_marked(encoded: Conditioning, prompts: Sequence[str], word: str) -> Tensor:
    """The encodings (B, D) at the last marked position of each prompt.

    Raises:
        ValueError: naming a prompt that has none.
    """
    mask = encoded.mask.cpu()
    if mask.shape != encoded.encodings.shape[:2] or mask.shape[0] != len(prompts):
        raise ValueError(
            f"expected a mask {(len(prompts), encoded.encodings.shape[1])} for {len(prompts)} "
            f"prompts, found {tuple(mask.shape)}"
        )
    for prompt, present in zip(prompts, mask.any(dim=1).tolist(), strict=True):
        if not present:
            raise ValueError(f"expected {word!r} in every prompt, found {prompt!r} without it")
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1).tolist()
    return torch.stack([encoded.encodings[row, at] for row, at in enumerate(last)])


def _superclass_encoding(denoiser: Denoiser, config: TrainingConfig) -> Tensor:
    """Mean over the prompts of the superclass's last sub-word, (D,) fp32."""
    tokens = []
    sentences = tuple(dict.fromkeys(config.captions)) or config.templates
    with torch.no_grad():
        for start in range(0, len(sentences), config.batch_size):
            templates = sentences[start : start + config.batch_size]
            prompts = [fill(template, config.superclass) for template in templates]
            encoded = denoiser.encode_superclass(prompts)
            tokens.append(last_marked(encoded, prompts, config.superclass))
    encoding = torch.cat(tokens).float().mean(0)
    if not bool(torch.isfinite(encoding).all()):
        raise ValueError(
            f"expected a finite encoding of {config.superclass!r}, found NaN or infinity; "
            "check the text encoder"
        )
    return encoding


def _parameters(tensors: Mapping[str, Tensor], trainable: bool) -> dict[str, Tensor]:
    return {
        name: tensor.detach().float().clone().requires_grad_(trainable)
        for name, tensor in tensors.items()
    }


def _read(losses: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The losses (B,) on the CPU, and whether all tensors are finite; a GPU is waited for once.

    Raises:
        TrainingError: when a loss is NaN or infinite.
    """
    finite = [tensor.isfinite().all()[None].to(losses) for tensor in tensors]
    read = torch.cat([losses, *finite]).cpu()
    found = read[: len(losses)]
    if not bool(torch.isfinite(found).all()):
        raise TrainingError(f"its loss is {float(found.mean())}")
    return found, bool(read[len(losses) :].all())


def _expected(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        what = "nothing" if found is None else str(tuple(found.shape))
        raise ValueError(
            f"the training state's {name}: expected {tuple(like.shape)}, found {what}; it belongs "
            "to another model or is damaged: train from the start"
        )
    return found
