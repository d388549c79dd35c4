"""The method on a modality that is no picture: a pen's movement, drawn from a sentence.

    python -m research.text_to_motion --plot motion.png    (in the repository's folder)

Trains a small network from nothing (a text encoder, and a decoder that reads it by
cross-attention at every moment of the movement), then teaches it a figure it has no word for, a
heart, from five drawn by hand, so to speak. Nothing but the wrapping calls knows of the method;
the network could as well make sound. Takes about a minute on two cores.

The plot shows the given movements, the word "circle" and the learned concept in the same
sentences, the gate's bias at work, and for each word of a sentence how far its gate is open.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from perfusion import (
    ConceptInputs,
    EmbeddingWrapper,
    calculate_input_covariance,
    get_finetune_optimizer,
    loss_fn_weighted_by_mask,
    make_key_value_proj_rank1_edit_modules_,
    save_modules,
)

log = logging.getLogger("example")

MOMENTS, TOKENS, WIDTH, FEATURES, HARMONICS = 48, 8, 64, 64, 4
SIZES = {"small": 0.5, "large": 1.5}
PLACES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "above": (0.0, 1.0), "below": (0.0, -1.0)}
SCRIBBLES = 40
TEMPLATES = ("draw a {}", "draw a small {}", "draw a large {}", "draw a {} left", "draw a {} above")


def figures() -> dict[str, Tensor]:
    """The figures that have a name, each a closed movement (2, MOMENTS): x and y over time."""
    time = torch.arange(MOMENTS) / MOMENTS * 2 * math.pi
    found = {
        "circle": torch.stack([time.sin(), time.cos()]),
        "oval": torch.stack([time.sin(), 0.5 * time.cos()]),
        "bow": torch.stack([time.cos(), (2 * time).sin()]),
        "flower": (1 + 0.5 * (3 * time).cos()) * torch.stack([time.sin(), time.cos()]) / 1.2,
    }
    random = torch.Generator().manual_seed(0)
    order = torch.arange(1, HARMONICS + 1)
    waves = torch.cat([(order[:, None] * time).sin(), (order[:, None] * time).cos()])
    falling = (1 / order).repeat(2)
    for number in range(SCRIBBLES):
        amplitudes = torch.randn(2, 2 * HARMONICS, generator=random) * falling
        path = amplitudes @ waves
        found[f"scribble{number}"] = path / path.norm(dim=0).max()
    return found


def heart() -> Tensor:
    """The figure without a name, (2, MOMENTS)."""
    t = torch.arange(MOMENTS) / MOMENTS * 2 * math.pi
    y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    return torch.stack([16 * t.sin() ** 3, y + 2.5]) / 16


FIGURES = figures()
WORDS = ["<pad>", "<end>", "draw", "a", *SIZES, *PLACES, *FIGURES]


def tokenize(texts: Sequence[str]) -> Tensor:
    """Sentences of known words as ids (B, TOKENS)."""
    rows = [[*(WORDS.index(word) for word in text.split()), 1] for text in texts]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


def placed(path: Tensor, sentence: str) -> Tensor:
    """A figure as a sentence asks for it: of its size, in its place."""
    words = sentence.split()
    for word in words:
        path = path * SIZES.get(word, 1.0)
    offset = next((PLACES[word] for word in words if word in PLACES), (0.0, 0.0))
    return path + torch.tensor(offset)[:, None]


class TextEncoder(nn.Module):
    """Token vectors (B, N, WIDTH) -> encodings, from left to right."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(WORDS), WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.mixing = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = vectors + self.positions
        q, k, v = self.mixing(hidden).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.layer_norm(hidden + self.out(mixed), (WIDTH,))


class CrossAttention(nn.Module):
    """Moments of the movement read the text."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(FEATURES, FEATURES, bias=False)
        self.to_k = nn.Linear(WIDTH, FEATURES, bias=False)
        self.to_v = nn.Linear(WIDTH, FEATURES, bias=False)

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        heads = [
            tensor.unflatten(-1, (4, -1)).transpose(1, 2)
            for tensor in (self.to_q(hidden), self.to_k(text), self.to_v(text))
        ]
        read = functional.scaled_dot_product_attention(*heads)
        return read.transpose(1, 2).flatten(2)


class Pen(nn.Module):
    """Conditioning text (B, N, WIDTH) -> a movement (B, 2, MOMENTS)."""

    def __init__(self) -> None:
        super().__init__()
        time = torch.arange(MOMENTS) / MOMENTS * 2 * math.pi
        order = torch.arange(1, HARMONICS + 1)
        clock = torch.cat([(order[:, None] * time).sin(), (order[:, None] * time).cos()]).mT
        self.register_buffer("clock", clock)
        self.enter = nn.Linear(2 * HARMONICS, FEATURES)
        self.attentions = nn.ModuleList([CrossAttention() for _ in range(3)])
        self.mixing = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, 2 * FEATURES), nn.GELU(), nn.Linear(128, FEATURES))
            for _ in range(3)
        )
        self.leave = nn.Linear(FEATURES, 2)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.enter(self.clock).expand(len(text), -1, -1)
        for attention, mixing in zip(self.attentions, self.mixing, strict=True):
            hidden = hidden + attention(functional.layer_norm(hidden, (FEATURES,)), text)
            hidden = hidden + mixing(functional.layer_norm(hidden, (FEATURES,)))
        return self.leave(hidden).mT


def learn_to_draw(steps: int) -> tuple[TextEncoder, Pen, float]:
    """The networks, trained on every named figure in all sizes and places; and the last loss."""
    torch.manual_seed(1)
    encoder, pen = TextEncoder(), Pen()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *pen.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    random = torch.Generator().manual_seed(2)
    names, sizes, places = [*FIGURES], ["", *SIZES], ["", *PLACES]

    def any_of(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=random))]

    loss = torch.zeros(())
    for _ in range(steps):
        drawn = [(any_of(sizes), any_of(names), any_of(places)) for _ in range(48)]
        sentences = [" ".join(f"draw a {s} {n} {p}".split()) for s, n, p in drawn]
        wanted = torch.stack(
            [placed(FIGURES[d[1]], s) for d, s in zip(drawn, sentences, strict=True)]
        )
        loss = (pen(encoder(encoder.tokens(tokenize(sentences)))) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.requires_grad_(False), pen.requires_grad_(False), float(loss.detach())


@dataclass(frozen=True)
class Learned:
    """The networks with a concept in the place of the word "circle"."""

    encoder: TextEncoder
    pen: Pen
    inputs: ConceptInputs
    embed: EmbeddingWrapper
    losses: list[float]

    def draw(self, sentences: Sequence[str]) -> Tensor:
        """Movements (B, 2, MOMENTS) in which "circle" means the concept."""
        with torch.no_grad():
            return self.pen(self.embed(sentences, clip_transformer_fn=self.encoder)[0])

    def gates(self, sentence: str) -> Tensor:
        """How far the gate is open at each token (N,)."""
        with torch.no_grad():
            text = self.embed([sentence], clip_transformer_fn=self.encoder)[0]
            return self.inputs.gated(text, (0,), training=False)[1][0, :, 0]


def learn_concept(encoder: TextEncoder, pen: Pen, given: Tensor, steps: int) -> Learned:
    """Teach the figure of the movements ``given`` (n, 2, MOMENTS)."""

    def embed_texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = tokenize(texts)
        return encoder(encoder.tokens(ids)), ids != 0

    captions = [template.format(name) for template in TEMPLATES for name in FIGURES]
    covariance = calculate_input_covariance(embed_texts, captions)
    inputs: ConceptInputs | None = None
    for attention in pen.attentions:
        inputs = make_key_value_proj_rank1_edit_modules_(
            attention,
            key_proj_name="to_k",
            value_proj_name="to_v",
            input_covariance=None if inputs else covariance,
            inputs=inputs,
        )
    assert inputs is not None
    embed = EmbeddingWrapper(
        encoder.tokens, superclass_string="circle", tokenize=tokenize, tokenizer_sos_eos_id=(-1, 1)
    )
    optimizer = get_finetune_optimizer(pen, embed)
    sentences = [template.format("circle") for template in TEMPLATES]
    random = torch.Generator().manual_seed(3)
    losses: list[float] = []
    for _ in range(steps):
        # What a sentence says of size and place is true of its example, so the figure alone
        # is left to learn.
        chosen = torch.randint(len(given), (len(sentences),), generator=random)
        wanted = torch.stack([placed(given[n], s) for n, s in zip(chosen, sentences, strict=True)])
        text, superclass, _, indices = embed(sentences, clip_transformer_fn=encoder)
        with inputs.given(concept_indices=indices, text_enc_with_superclass=superclass):
            drawn = pen(text)
        everywhere = torch.ones(len(sentences), MOMENTS)
        loss = loss_fn_weighted_by_mask(drawn, wanted, everywhere)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    pen.eval()
    embed.eval()
    return Learned(encoder, pen, inputs, embed, losses)


def run(pen_steps: int, concept_steps: int, folder: Path) -> tuple[Learned, dict[str, Tensor]]:
    """Train everything, save the concept to ``folder``; returns what the plot needs."""
    encoder, pen, loss = learn_to_draw(pen_steps)
    log.info("the network draws %d named figures with a mean error of %.4f", len(FIGURES), loss)
    random = torch.Generator().manual_seed(4)
    given = heart() + 0.05 * torch.randn(5, 2, 1, generator=random)
    given = given * (1 + 0.1 * torch.randn(5, 1, 1, generator=random))
    sentences = [
        "draw a circle",
        "draw a small circle right",
        "draw a large circle",
        "draw a circle below",
    ]
    others = ["draw a bow", "draw a flower left"]
    with torch.no_grad():
        word = pen(encoder(encoder.tokens(tokenize(sentences))))
        others_before = pen(encoder(encoder.tokens(tokenize(others))))
    learned = learn_concept(encoder, pen, given, concept_steps)
    wanted = torch.stack([placed(heart(), sentence) for sentence in sentences])
    results = {"given": given, "word": word, "concept": learned.draw(sentences), "wanted": wanted}
    results["others"] = learned.draw(others)
    results["others_wanted"] = torch.stack([placed(FIGURES[s.split()[2]], s) for s in others])
    for name in ("word", "concept"):
        error = float((results[name] - wanted).square().mean())
        log.info("mean squared error to the figure as asked for, %s: %.4f", name, error)
    for when, drawn in (("before", others_before), ("with the concept", results["others"])):
        error = float((drawn - results["others_wanted"]).square().mean())
        log.info("mean squared error of other figures, %s: %.4f", when, error)
    path = save_modules(
        pen,
        folder / "heart.safetensors",
        placeholder="<heart>",
        embedding=learned.embed,
        dtype=torch.float16,
    )
    log.info("%s has %d bytes", path, path.stat().st_size)
    return learned, results


def plot(learned: Learned, results: dict[str, Tensor], path: Path) -> None:
    """Draw the figure that the module's first lines describe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 10.5), layout="constrained")
    parts = figure.add_gridspec(2, 1, height_ratios=[4, 1])
    upper, lower = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
    axes = upper.subplots(4, 5)
    for axis in axes.flat:
        axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")

    def line(axis: object, movement: Tensor, title: str, colour: str) -> None:
        closed = torch.cat([movement, movement[:, :1]], dim=1)
        axis.plot(*closed.tolist(), color=colour, linewidth=2)  # type: ignore[attr-defined]
        axis.scatter(*movement[:, 0].tolist(), color=colour, s=18)  # type: ignore[attr-defined]
        axis.set_title(title, fontsize=9)  # type: ignore[attr-defined]

    for axis, movement in zip(axes[0], results["given"], strict=True):
        line(axis, movement, "given", "black")
    titles = ["draw a *", "draw a small * right", "draw a large *", "draw a * below"]
    for column, title in enumerate(titles):
        line(axes[1, column], results["word"][column], title.replace("*", "circle"), "tab:gray")
        line(axes[2, column], results["concept"][column], title.replace("*", "<heart>"), "tab:red")
    line(axes[1, 4], results["others"][0], "draw a bow\n(concept in place)", "tab:blue")
    line(axes[2, 4], results["others"][1], "draw a flower left\n(concept in place)", "tab:blue")
    for axis, bias in zip(axes[3], (0.2, 0.65, 0.9, 1.1, 1.6), strict=True):
        learned.inputs.set_gate(bias=bias)
        line(axis, learned.draw(["draw a circle"])[0], f"<heart>, gate bias {bias}", "tab:red")
    learned.inputs.set_gate(bias=0.65)
    bars, curve = lower.subplots(1, 2, width_ratios=[3, 2])
    sentence = "draw a large circle left"
    words = ["<heart>" if word == "circle" else word for word in sentence.split()] + ["<end>"]
    bars.bar(words, learned.gates(sentence)[: len(words)].tolist(), color="tab:red")
    bars.set_title("how far the gate of each word is open", fontsize=9)
    bars.set_ylim(0, 1)
    curve.semilogy(learned.losses, color="black")
    curve.set_title("loss while the concept is learned, by step", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Command line: where to put the plot and the concept's file, and how long to train."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Teach a text-to-movement network a heart.")
    parser.add_argument("--plot", type=Path, default=Path("text_to_motion.png"))
    parser.add_argument("--pen-steps", type=int, default=600)
    parser.add_argument("--concept-steps", type=int, default=150)
    options = parser.parse_args()
    learned, results = run(options.pen_steps, options.concept_steps, options.plot.parent)
    plot(learned, results, options.plot)
    log.info("%s shows it", options.plot)


if __name__ == "__main__":
    main()
