"""What is learned of a concept, and one optimiser step of it (Perfusion, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..gated.covariance import Covariance
from .config import TrainingConfig
from .denoiser import Batch, Denoiser
from .local_lock import LocalLock
from .lock import Lock, StepText, TrainingError
from .losses import image_losses
from .rates import full_rate, parameter_groups
from .twin_lock import TwinLock

_FIRST_SCALE = 2.0**16
_STEPS_TO_RAISE_SCALE = 200


class Learner:
    """What is learned in one run, with its optimiser; `lock` says how text takes part."""

    def __init__(self, denoiser: Denoiser, config: TrainingConfig, covariance: Covariance) -> None:
        self.denoiser = denoiser
        self.config = config
        self.covariance = covariance
        kind = TwinLock if config.mode == "twin_lock" else LocalLock
        self.lock: Lock = kind(denoiser, config, covariance)
        rated = []
        for name, parameter in self._named():
            if parameter.requires_grad:
                of, _, rest = name.partition(".")
                rated.append((parameter, full_rate(denoiser, config, covariance, of, rest)))
        self.optimizer = torch.optim.Adam(parameter_groups(rated))
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
        losses, order = self._backward(batch, self._text(prompts), rows_at_once)
        # Only fp16 is scaled: the same rows once more, with gradients fp16 can hold.
        while self.scale > 1.0 and not _read(losses, self._gradients())[1]:
            self.scale, self.since_scaled = self.scale / 2, 0
            losses, order = self._backward(batch, self._text(prompts, follow=False), rows_at_once)
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
        return found | {"i": self.lock.i}

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
        i = _expected(tensors, "i", self.lock.i)
        self.lock.restore(i.to("cpu", torch.float64, copy=True))
        self.scale, self.since_scaled = scale, since_scaled

    def _text(self, prompts: Sequence[str], follow: bool = True) -> StepText:
        self.optimizer.zero_grad()
        return self.lock.text(prompts, follow)

    def _backward(self, batch: Batch, text: StepText, rows_at_once: int) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss, times the scale, in every parameter.

        Returns the losses (B,) fp32 where they were made, and which row of the batch each is of.
        """
        parts = list(self._parts(batch, rows_at_once))
        losses = []
        for number, chosen in enumerate(parts, 1):
            # The graph of the text is used by every part.
            last = number == len(parts)
            losses.append(self._part(batch, text, None if len(parts) == 1 else chosen, last))
        self._check_gradients()
        return torch.cat(losses), torch.cat(parts)

    def _part(self, batch: Batch, text: StepText, chosen: Tensor | None, last: bool) -> Tensor:
        """The losses (n,) of some rows or all, with their gradients added to the others'."""
        config, size = self.config, len(batch.indices)
        with torch.enable_grad():
            rows = batch if chosen is None else batch.rows(chosen)
            errors = self.denoiser.errors(rows, *text.rows(chosen))
            found = image_losses(
                errors, self.denoiser.masks(rows), config.background, config.normalisation
            )
            (found.sum() * (self.scale / size)).backward(retain_graph=not last)
        return found.detach().float()

    def _parts(self, batch: Batch, rows_at_once: int) -> Iterator[Tensor]:
        """Rows (n,) that are computed together: of one shape, at most ``rows_at_once``."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for row, index in enumerate(batch.indices.tolist()):
            shapes.setdefault(self.denoiser.shape(index), []).append(row)
        for rows in shapes.values():
            yield from torch.tensor(rows).split(rows_at_once)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        lock = self.lock
        for kind, tensors in (("embedding", lock.embeddings), ("v", lock.values), ("k", lock.keys)):
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
