"""Statistics of a real CLIP are those of what its encode node gives out."""

from __future__ import annotations

import logging

import folder_paths
import pytest
import torch
from comfy import sd
from comfy.model_management import InterruptProcessingException
from comfyui_perfusion.host.text import covariance
from comfyui_perfusion.host.text.caption_sources import of_file, of_text
from comfyui_perfusion.host.text.captions import everyday_captions
from comfyui_perfusion.host.text.covariance import covariance_of, measure_covariance
from comfyui_perfusion.host.text.text_encoders import TextEncoders
from comfyui_perfusion.nodes.training import PerfusionCovariance

CAPTIONS = ["a cat", "two dogs on the beach, at night", "word " * 90]
# Tokens and the end token; the long one takes two sections.
TOKENS = 2 + 1 + 8 + 1 + 90 + 2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_is_the_mean_over_words_and_end_tokens_of_the_encode_nodes_output(worlds, family):
    clip = worlds.clip(family)
    rows = []
    for caption in CAPTIONS:
        tokens = clip.tokenize(caption)
        encoding = clip.encode_from_tokens(tokens)[0].double()
        for at, section in enumerate(tokens["l"]):
            ids = [token for token, _ in section]
            end = ids.index(49407)
            rows.append(encoding[77 * at + 1 : 77 * at + end + 1])
    wanted = torch.cat(rows)
    found = measure_covariance(clip, CAPTIONS)
    assert found.tokens == len(wanted) == TOKENS
    assert found.positions == "words"
    expected = wanted.mT @ wanted / len(wanted)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-4, atol=1e-4)


def test_captions_without_a_word_are_refused(worlds):
    with pytest.raises(ValueError, match="captions to measure the covariance on, found none"):
        measure_covariance(worlds.clip("sd1"), ["", "  "])


def test_progress_is_told_after_each_batch(worlds):
    told = []
    measure_covariance(worlds.clip("sd1"), ["a"] * 40, lambda *done: told.append(done))
    assert told == [(32, 40), (40, 40)]


def test_the_digest_follows_clip_skip_lora_and_weights_but_not_placeholders(worlds):
    clip = worlds.clip("sd1")
    own = TextEncoders(clip).digest()
    assert TextEncoders(clip.clone()).digest() == own
    skipped = clip.clone()
    skipped.clip_layer(-2)
    key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    lora = {
        f"{key}.lora_up.weight": torch.ones(64, 1),
        f"{key}.lora_down.weight": torch.ones(1, 768),
    }
    changed = sd.load_lora_for_models(None, clip, lora, 1.0, 0.5)[1]
    stronger = sd.load_lora_for_models(None, clip, lora, 1.0, 0.6)[1]
    digests = {own, *(TextEncoders(each).digest() for each in (skipped, changed, stronger))}
    assert len(digests) == 4
    assert TextEncoders(worlds.new_clip("sd1", seed=9)).digest() not in digests


def test_all_positions_count_the_start_and_the_padding_too(worlds):
    clip = worlds.clip("sd1")
    found = measure_covariance(clip, CAPTIONS[:2], positions="all")
    rows = torch.cat([clip.encode_from_tokens(clip.tokenize(c))[0] for c in CAPTIONS[:2]]).double()
    assert found.tokens == 2 * 77
    expected = rows.mT @ rows / (2 * 77)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-4, atol=1e-4)


def test_the_built_in_captions_are_a_hundred_thousand_different_ones_and_always_the_same():
    captions = list(everyday_captions(100_000))
    assert len(set(captions)) == 100_000
    assert list(everyday_captions(50)) == captions[:50]
    assert next(everyday_captions(1, seed=1)) != captions[0]
    words = {word for caption in captions for word in caption.split()}
    assert len(words) > 600


@pytest.fixture
def counted(monkeypatch):
    """The measurements made from now on."""
    calls = []
    original = covariance.measure_covariance

    def measure(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(covariance, "measure_covariance", measure)
    return calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/perfusion_covariance."""
    entry = ([str(tmp_path)], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "perfusion_covariance", entry)
    return tmp_path


def test_a_covariance_is_found_again_for_the_same_encoder_captions_and_positions(
    worlds, counted, folder
):
    clip, source = worlds.clip("sd1"), of_text("a cat\na dog")
    first = covariance_of(clip, source)
    # As after a restart: all that is left is the file.
    again = covariance_of(worlds.new_clip("sd1"), of_text("a cat\n\n  a dog  "))
    assert len(counted) == 1
    assert again.digest == first.digest
    assert torch.equal(again.matrix, first.matrix)
    skipped = clip.clone()
    skipped.clip_layer(-2)
    covariance_of(skipped, source)
    covariance_of(clip, of_text("a cat\na fox"))
    covariance_of(clip, source, positions="all")
    covariance_of(worlds.new_clip("sd1", seed=9), source)
    assert len(counted) == 5
    assert len(list(folder.iterdir())) == 5


def test_a_damaged_file_is_measured_anew_and_replaced(worlds, counted, folder, caplog):
    clip, source = worlds.clip("sd1"), of_text("a cat")
    covariance_of(clip, source)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:5000])
    with caplog.at_level(logging.WARNING, logger="perfusion"):
        covariance_of(clip, source)
    assert "its file cannot be used" in caplog.text
    covariance_of(clip, source)
    assert len(counted) == 2


def test_an_interrupted_measurement_leaves_no_file(worlds, folder):
    def stop(done, total):
        raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        covariance_of(worlds.clip("sd1"), of_text("a cat"), stop)
    assert not list(folder.iterdir())


def test_a_text_file_is_read_line_by_line_and_never_as_a_whole(worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "mine.txt").write_text("\ufeffa cat\n\n  two dogs\n" + "word " * 1000, "utf-8")
    source = of_file("mine.txt")
    assert source.count == 5
    assert list(source.read())[:2] == ["a cat", "two dogs"]
    assert max(len(caption) for caption in source.read()) <= 2000
    assert source.key == of_file("mine.txt").key
    read = []
    monkeypatch.setattr(covariance, "BATCH", 2)

    def told(done, total):
        read.append((done, total))

    measure_covariance(worlds.clip("sd1"), source.read(), told, total=source.count)
    assert read == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("name", ["../outside.txt", "missing.txt", "/etc/hostname", "."])
def test_a_file_outside_of_the_input_folder_is_refused(tmp_path, monkeypatch, name):
    inside = tmp_path / "input"
    inside.mkdir()
    (tmp_path / "outside.txt").write_text("a cat")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(inside))
    with pytest.raises(FileNotFoundError, match="there is no text file"):
        of_file(name)


def test_a_text_without_captions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    (tmp_path / "empty.txt").write_text("\n  \n")
    for make in (lambda: of_text("  \n"), lambda: of_file("empty.txt")):
        with pytest.raises(ValueError, match="found none; write one a line"):
            make()


def test_the_report_tells_captions_tokens_and_condition(worlds, folder):
    found, report = PerfusionCovariance.execute(worlds.clip("sd1"), "a cat\ntwo dogs").args
    assert report == (
        f"2 captions, 6 tokens (words and end tokens), 768 wide, condition number "
        f"{found.condition_number():.3g}"
    )
