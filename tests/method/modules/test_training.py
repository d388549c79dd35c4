"""Training with the modules: a real network with cross-attention, trained here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from perfusion import (
    ConceptInputs,
    Covariance,
    EmbeddingWrapper,
    Rank1EditModule,
    calculate_input_covariance,
    finetune_groups,
    get_finetune_optimizer,
    get_finetune_parameters,
    load_modules,
    loss_fn_weighted_by_mask,
    make_key_value_proj_rank1_edit_modules_,
    save_modules,
)
from perfusion.concept.concept_file import load_concept
from perfusion.training.losses import masked_mean

WORDS = ["<pad>", "<end>", "a", "photo", "of", "the", "my", "cat", "dog", "bird"]
COLOURS = {"cat": (0.9, -0.8, -0.7), "dog": (-0.8, 0.9, -0.6), "bird": (-0.7, -0.6, 0.9)}
THING = (0.8, 0.7, -0.9)  # a colour without a word
TEMPLATES = ("a {}", "a photo of a {}", "the {}", "a photo of my {}")
TOKENS, WIDTH, FEATURES, PLACES = 8, 16, 24, 5


def tokenize(texts: list[str]) -> Tensor:
    rows = [[*(WORDS.index(word) for word in text.split()), 1] for text in texts]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


class Text(nn.Module):
    """Token vectors through one causal self-attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(WORDS), WIDTH)
        self.positions = nn.Parameter(0.2 * torch.randn(TOKENS, WIDTH))
        self.mixing = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, vectors: Tensor) -> Tensor:
        hidden = vectors + self.positions
        q, k, v = self.mixing(hidden).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.layer_norm(hidden + mixed, (WIDTH,))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(FEATURES, FEATURES, bias=False)
        self.to_k = nn.Linear(WIDTH, FEATURES, bias=False)
        self.to_v = nn.Linear(WIDTH, FEATURES, bias=False)
        self.out = nn.Linear(FEATURES, FEATURES)

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.to_q(hidden), self.to_k(text), self.to_v(text)
        read = functional.scaled_dot_product_attention(q, k, v)
        return hidden + functional.gelu(self.out(hidden + read))


class Painter(nn.Module):
    """Text in, colours (B, 3, places) out."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(0.5 * torch.randn(PLACES, FEATURES))
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.leave = nn.Linear(FEATURES, 3)
        self.checkpointing: bool | None = None  # or whether it is the reentrant kind

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.places.expand(len(text), -1, -1)
        for layer in self.layers:
            if self.checkpointing is None:
                hidden = layer(hidden, text)
            else:
                hidden = checkpoint(layer, hidden, text, use_reentrant=self.checkpointing)
        return self.leave(hidden).mT


def colours(colour: tuple[float, ...], count: int) -> Tensor:
    return torch.tensor(colour)[None, :, None].expand(count, 3, PLACES)


@pytest.fixture(scope="module")
def trained() -> tuple[Text, Painter]:
    """Networks that have learned what colour a cat, a dog and a bird have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text, painter = Text(), Painter()
    optimizer = torch.optim.Adam([*text.parameters(), *painter.parameters()], lr=5e-3)
    prompts = [template.format(name) for name in COLOURS for template in TEMPLATES]
    ids = tokenize(prompts)
    wanted = torch.cat([colours(colour, len(TEMPLATES)) for colour in COLOURS.values()])
    for _ in range(200):
        loss = (painter(text(text.tokens(ids))) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01
    optimizer.zero_grad()
    return text.requires_grad_(False), painter.requires_grad_(False)


class Setting:
    """The networks with a concept's place made in them."""

    def __init__(self, text: Text, painter: Painter, num_concepts: int = 1) -> None:
        self.text, self.painter = copy.deepcopy(text), copy.deepcopy(painter)
        captions = [t.format(name) for t in TEMPLATES for name in COLOURS]
        self.covariance: Covariance = calculate_input_covariance(self.plainly, captions)
        self.inputs: ConceptInputs | None = None
        for layer in self.painter.layers:
            settings = {"num_concepts": num_concepts} if self.inputs is None else {}
            self.inputs = make_key_value_proj_rank1_edit_modules_(
                layer,
                key_proj_name="to_k",
                value_proj_name="to_v",
                input_covariance=None if self.inputs else self.covariance,
                inputs=self.inputs,
                **settings,
            )
        self.embed = EmbeddingWrapper(
            self.text.tokens,
            superclass_string="cat",
            tokenize=tokenize,
            tokenizer_sos_eos_id=(-1, 1),
        )

    def plainly(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = tokenize(texts)
        return self.text(self.text.tokens(ids)), ids != 0

    def loss(self, prompts: list[str], mask: Tensor | None = None) -> Tensor:
        text, superclass, _, indices = self.embed(prompts, clip_transformer_fn=self.text)
        with self.inputs.given(concept_indices=indices, text_enc_with_superclass=superclass):
            painted = self.painter(text)
        mask = torch.ones(len(prompts), PLACES) if mask is None else mask
        return loss_fn_weighted_by_mask(painted, colours(THING, len(prompts)), mask)

    def painted(self, prompts: list[str]) -> Tensor:
        with torch.no_grad():
            return self.painter(self.embed(prompts, clip_transformer_fn=self.text)[0])

    def eval(self) -> Setting:
        self.painter.eval()
        self.embed.eval()
        return self


@pytest.fixture
def setting(trained) -> Setting:
    return Setting(*trained)


PROMPTS = [template.format("cat") for template in TEMPLATES]


def train(setting: Setting, steps: int) -> list[float]:
    optimizer = get_finetune_optimizer(setting.painter, setting.embed)
    losses = []
    for _ in range(steps):
        loss = setting.loss(PROMPTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_converges_to_what_no_word_could_say_and_leaves_other_words_alone(setting):
    dogs = [template.format("dog") for template in TEMPLATES]
    losses = train(setting, 160)
    assert losses[-1] < 0.1 * losses[0]
    setting.eval()
    thing = colours(THING, len(PROMPTS))
    error = (setting.painted(PROMPTS) - thing).square().mean()
    word = (colours(COLOURS["cat"], len(PROMPTS)) - thing).square().mean()
    assert float(error) < 0.15 * float(word)
    painted = setting.painted(dogs)
    dog_error = (painted - colours(COLOURS["dog"], len(dogs))).square().mean()
    assert float(dog_error) < 0.5 * float((painted - thing).square().mean())


def test_what_trains_are_the_values_and_the_slower_embedding_and_nothing_else(setting):
    groups = finetune_groups(setting.painter, setting.embed)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.006, 1), (0.03, 2)]
    setting.loss(PROMPTS).backward()
    wanted = {
        id(parameter) for parameter in get_finetune_parameters(setting.painter, setting.embed)
    }
    modules = (setting.painter, setting.embed, setting.text)
    for module in modules:
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in wanted), name
    for layer in setting.painter.layers:
        assert float(layer.to_v.concept_outputs.grad.abs().max()) > 0
    # The rate is a rate: the embedding's gradient is the whole one.
    optimizer = get_finetune_optimizer(setting.painter, setting.embed, lr=1.0, embedding_lr=0.25)
    before = setting.embed.concepts.detach().clone()
    optimizer.step()
    moved = (setting.embed.concepts - before).detach().abs().max()
    torch.testing.assert_close(moved, torch.tensor(0.25))
    with pytest.raises(ValueError, match="expected an EmbeddingWrapper or a Rank1EditModule"):
        get_finetune_optimizer(nn.Linear(2, 2))


def followed(setting: Setting, batches: list[list[str]], decay: float = 0.99) -> Tensor:
    """i by the definition: once per batch, from the superclass's mean."""
    i = None
    for prompts in batches:
        with torch.no_grad():
            found = setting.embed(prompts, clip_transformer_fn=setting.text)
        rows = torch.arange(len(prompts))
        if i is None:
            i = found.embed_with_superclass[rows, found.concept_indices].mean(0)
        newest = found.embed_with_concept[rows, found.concept_indices].mean(0)
        i = decay * i + (1 - decay) * newest
    return i


BATCHES = [[PROMPTS[0], PROMPTS[1]], [PROMPTS[2]], [PROMPTS[3], PROMPTS[0]]]


@pytest.mark.parametrize("own_optimizer", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_the_input_moves_once_per_step_however_often_layers_run(
    checkpointing, own_optimizer, setting
):
    setting.painter.checkpointing = checkpointing
    setting.inputs.input_decay = 0.8
    parameters = get_finetune_parameters(setting.painter, setting.embed)
    if own_optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.0)
    else:
        optimizer = get_finetune_optimizer(
            setting.painter, setting.embed, lr=1e-9, embedding_lr=1e-9
        )
    for prompts in BATCHES:
        setting.loss(prompts).backward()
        optimizer.step()
    expected = followed(setting, BATCHES, 0.8)
    torch.testing.assert_close(setting.inputs.i[0], expected, rtol=1e-5, atol=1e-5)
    dual = setting.covariance.dual(setting.inputs.i[0]).float()
    torch.testing.assert_close(setting.inputs.u[0], dual, rtol=1e-4, atol=1e-4)


def test_two_steps_with_the_same_prompts_are_two_steps(setting):
    setting.inputs.input_decay = 0.5
    with torch.no_grad():
        setting.embed.concepts += 1
    optimizer = get_finetune_optimizer(setting.painter, setting.embed, lr=1e-9, embedding_lr=1e-9)
    for _ in range(2):
        setting.loss(PROMPTS).backward()
        optimizer.step()
    expected = followed(setting, [PROMPTS, PROMPTS], 0.5)
    torch.testing.assert_close(setting.inputs.i[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_accumulated_batches_are_one_step_towards_the_mean_over_all_their_prompts(
    checkpointing, setting
):
    setting.painter.checkpointing = checkpointing
    setting.inputs.input_decay = 0.5
    optimizer = get_finetune_optimizer(setting.painter, setting.embed, lr=1e-9, embedding_lr=1e-9)
    setting.loss(BATCHES[0]).backward()
    optimizer.step()
    before = setting.inputs.i[0].clone()
    # One of the batches comes twice, so it counts twice.
    batches = [*BATCHES[1:], BATCHES[1]]
    for prompts in batches:
        setting.loss(prompts).backward()
    optimizer.step()
    prompts = [prompt for batch in batches for prompt in batch]
    with torch.no_grad():
        found = setting.embed(prompts, clip_transformer_fn=setting.text)
    rows = torch.arange(len(prompts))
    newest = found.embed_with_concept[rows, found.concept_indices].mean(0)
    torch.testing.assert_close(setting.inputs.i[0], 0.5 * before + 0.5 * newest)
    dual = setting.covariance.dual(setting.inputs.i[0]).float()
    torch.testing.assert_close(setting.inputs.u[0], dual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_finds_each_accumulated_batch_again(reentrant, trained):
    """Both batches go through the network before either goes backward."""
    gradients = []
    for checkpointing in (None, reentrant):
        setting = Setting(*trained)
        setting.painter.checkpointing = checkpointing
        setting.inputs.input_decay = 0.5
        get_finetune_optimizer(setting.painter, setting.embed)
        with torch.no_grad():
            setting.embed.concepts += 0.3
        (setting.loss(BATCHES[0]) + setting.loss(BATCHES[1])).backward()
        parameters = get_finetune_parameters(setting.painter, setting.embed)
        gradients.append([parameter.grad.clone() for parameter in parameters])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant, trained):
    gradients = []
    for checkpointing in (None, reentrant):
        setting = Setting(*trained)
        setting.painter.checkpointing = checkpointing
        with torch.no_grad():
            setting.embed.concepts += 0.3
        setting.loss(PROMPTS).backward()
        parameters = get_finetune_parameters(setting.painter, setting.embed)
        gradients.append([parameter.grad.clone() for parameter in parameters])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_the_embedding_of_a_network_in_half_precision_is_trained_in_fp32(cast, setting):
    optimizer = get_finetune_optimizer(setting.embed)
    getattr(setting.embed, cast)()
    for _ in range(2):
        vectors = setting.embed(PROMPTS).embed_with_concept
        assert vectors.dtype == setting.text.tokens.weight.dtype != torch.float32
        optimizer.zero_grad()
        vectors.float().square().mean().backward()
        before = setting.embed.concepts.detach().clone()
        optimizer.step()
        assert setting.embed.concepts.dtype == torch.float32
        assert bool(torch.isfinite(setting.embed.concepts).all())
        assert not torch.equal(setting.embed.concepts, before)


def test_the_masked_loss_weighs_once_in_any_number_of_axes():
    flat = {"pred": torch.randn(2, 3, 20), "target": torch.randn(2, 3, 20)}
    weights = torch.rand(2, 20) + 0.1
    expected = []
    for n in range(2):
        w = weights[n] / weights[n].max()
        errors = (flat["pred"][n] - flat["target"][n]).square().mean(0)
        expected.append((errors * w).sum() / w.sum())
    found = loss_fn_weighted_by_mask(**flat, mask=weights)
    torch.testing.assert_close(found, torch.stack(expected).mean())
    as_picture = {name: tensor.reshape(2, 3, 4, 5) for name, tensor in flat.items()}
    for shape in ((2, 4, 5), (2, 1, 4, 5)):
        torch.testing.assert_close(
            loss_fn_weighted_by_mask(**as_picture, mask=weights.reshape(shape)), found
        )
    by_method = masked_mean(
        (as_picture["pred"] - as_picture["target"]).square(), weights.reshape(2, 1, 4, 5), 0.3
    )
    floored = loss_fn_weighted_by_mask(**flat, mask=weights, normalized_mask_min_value=0.3)
    torch.testing.assert_close(floored, by_method)


def test_masks_and_predictions_that_do_not_fit_are_refused():
    pred = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(2, 3, 5, 4\)"):
        loss_fn_weighted_by_mask(pred, torch.randn(2, 3, 5, 4), torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match=r"mask \(2, 4, 4\).*found \(2, 1, 8, 8\)"):
        loss_fn_weighted_by_mask(pred, pred, torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="finite weights from 0"):
        loss_fn_weighted_by_mask(pred, pred, -torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="mask of zeros"):
        loss_fn_weighted_by_mask(pred, pred, torch.zeros(2, 4, 4))
    error = loss_fn_weighted_by_mask(pred, pred + 2, torch.zeros(2, 4, 4), 0.1)
    torch.testing.assert_close(error, torch.tensor(4.0))


def test_a_trained_concept_is_saved_and_loaded_into_another_network(setting, trained, tmp_path):
    train(setting, 30)
    path = save_modules(
        setting.painter, tmp_path / "thing.safetensors", placeholder="<t>", embedding=setting.embed
    )
    concept = load_concept(path)
    assert (concept.superclass, concept.key_lock, concept.family) == ("cat", "local", "research")
    assert list(concept.o_v) == ["layers.0", "layers.1"]
    other = Setting(*trained, num_concepts=1)
    loaded = load_modules(other.painter, path, embedding=other.embed)
    assert loaded.placeholder == "<t>"
    expected = setting.eval().painted(PROMPTS)
    torch.testing.assert_close(other.eval().painted(PROMPTS), expected, rtol=0.01, atol=0.01)


def test_files_and_networks_that_do_not_fit_are_refused_and_nothing_is_changed(
    setting, trained, tmp_path
):
    path = tmp_path / "thing.safetensors"
    with pytest.raises(ValueError, match="concept 0 is empty"):
        save_modules(setting.painter, path, placeholder="<t>", embedding=setting.embed)
    train(setting, 1)
    with pytest.raises(ValueError, match="one EmbeddingWrapper in Painter, found 0"):
        save_modules(setting.painter, path, placeholder="<t>")
    with pytest.raises(IndexError, match="expected 0 to 0, found 1"):
        save_modules(
            setting.painter, path, placeholder="<t>", embedding=setting.embed, concept_id=1
        )
    save_modules(setting.painter, path, placeholder="<t>", embedding=setting.embed)
    other = Setting(*trained)
    before = {name: tensor.clone() for name, tensor in other.painter.state_dict().items()}
    with pytest.raises(ValueError, match=r"'g' \(16,\), found .*'l'"):
        load_modules(other.painter, path, embedding=other.embed, encoder="g")
    with pytest.raises(ValueError, match=r"expected Rank1EditModules .* Painter, found none"):
        load_modules(trained[1], path, embedding=other.embed)
    with pytest.raises(ValueError, match=r"missing: root; unknown: layers.0, layers.1"):
        load_modules(other.painter.layers[0], path, embedding=other.embed)
    other.painter.layers[1].to_v = Rank1EditModule(
        nn.Linear(WIDTH, 9, bias=False), inputs=other.inputs
    )
    with pytest.raises(ValueError, match=r"layer layers.1: expected 9 features, found 24"):
        load_modules(other.painter, path, embedding=other.embed)
    for name, tensor in other.painter.layers[0].state_dict().items():
        assert torch.equal(tensor, before[f"layers.0.{name}"])


def test_layers_with_inputs_of_their_own_cannot_become_one_file(tmp_path):
    model = nn.ModuleDict()
    for name in ("a", "b"):
        model[name] = nn.ModuleDict({"to_v": Rank1EditModule(nn.Linear(WIDTH, 9, bias=False))})
    with pytest.raises(ValueError, match="one ConceptInputs for all 2 layers"):
        save_modules(model, tmp_path / "x.safetensors", placeholder="<t>", superclass="cat")


def test_a_file_of_the_sizes_of_stable_diffusion_has_some_32_kilobytes(tmp_path):
    model, inputs = nn.ModuleDict(), None
    sizes = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320]
    assert sum(sizes) == 12480
    for number, size in enumerate(sizes):
        attention = nn.Module()
        attention.to_k, attention.to_v = (nn.Linear(768, size, bias=False) for _ in range(2))
        inputs = make_key_value_proj_rank1_edit_modules_(
            attention, key_proj_name="to_k", value_proj_name="to_v", inputs=inputs
        )
        model[f"block_{number}"] = attention
    inputs.set(0, torch.randn(768), torch.randn(768))
    for attention in model.values():
        attention.to_v.set_outputs(0, torch.randn(attention.to_v.linear.out_features))
    embed = EmbeddingWrapper(nn.Embedding(10, 768), superclass_embed_id=3)
    path = save_modules(
        model, tmp_path / "sd1.safetensors", placeholder="<t>", superclass="cat", embedding=embed
    )
    assert 31_000 < path.stat().st_size < 34_000
