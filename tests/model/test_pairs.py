"""Teaching pairs: what is read, what a batch holds, the loss with smoothed targets, a whole run and its resumption."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from model.families.registry import read_config, read_generation_defaults
from model.tokenizer import Tokenizer
from model.training.loss import cross_entropy
from model.training.options import OptionError, TrainConfig
from model.training.pairs import NOTHING, PairData, pair_tokenizer, read_pairs
from model.training.runlog import read_log
from model.training.trainer import learning_rate, train
from model.training.translate import pair_loss
from model.weights import load_decoder
from tests.model.conftest import random_decoder
from tests.model.test_encoder_decoder import VANILLA, dense_logits

Build = Callable[..., TrainConfig]
WORDS = "red blue green fox cat dog runs sits sleeps here there now".split()  # noqa: SIM905  # shorter


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A run of seconds: answers are their sources' words in capitals."""
    pairs = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 2 + i % 5)) for i in range(90)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{pair}\t{pair.upper()}\n" for pair in pairs))

    def make(**changes: object) -> TrainConfig:
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 300, "context": 32}
        pace = {"batch_tokens": 256, "steps": 8, "warmup": 2, "lr": 1e-2, "eval_every": 4, "save_every": 2}
        where = {"data": tmp_path / "pairs.tsv", "out": tmp_path / "out", "device": "cpu", "family": "transformer"}
        kind = {"schedule": "inverse-sqrt", "label_smoothing": 0.1, "dropout": 0.1, "dtype": "float32"}
        return TrainConfig(**{**sizes, **pace, **where, **kind, **changes})  # type: ignore[arg-type]

    return make


def silent(line: str) -> None:
    """A report that nobody reads."""


def losses(config: TrainConfig) -> list[tuple[str, str, str]]:
    return [(r["step"], r["train_nats"], r["valid_nats"]) for r in read_log(config.out / "run" / "loss.csv")]


def test_a_file_of_pairs_and_two_aligned_files_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("ein Hund\ta dog\n\tnothing\nzwei\ttwo\n")
    (tmp_path / "de").write_text("ein Hund\n\nzwei\n")
    (tmp_path / "en.gz").write_bytes(gzip.compress(b"a dog\nnothing\ntwo\n"))
    wanted = [("ein Hund", "a dog"), ("zwei", "two")]
    assert read_pairs(tmp_path / "pairs.tsv", None) == wanted
    assert read_pairs(tmp_path / "de", tmp_path / "en.gz") == wanted


@pytest.mark.parametrize(
    ("text", "message"), [("a dog\n", "line 1 has no two texts"), ("a\tb\tc\n", "line 1 has"), ("\t\n", "no pairs")]
)
def test_what_is_no_pair_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(OptionError, match=message):
        read_pairs(tmp_path / "pairs.tsv", None)


def test_an_epoch_has_every_pair_once_in_batches_of_like_lengths() -> None:
    pairs = [("a " * (1 + i % 9), f"{i}") for i in range(100)]
    data = PairData.of(pairs, pair_tokenizer(pairs, 300), 64)
    epochs = []
    for epoch in range(2):
        drawn = [data.draw(7, step + epoch * data.num_batches(128), 128) for step in range(data.num_batches(128))]
        epochs.append([tuple(row) for batch in drawn for row in batch.targets.tolist()])
        assert sum(len(batch.source) for batch in drawn) == len(pairs)
        assert all(batch.lengths.max() == batch.source.shape[1] for batch in drawn)
        assert max(len(batch.source) * (batch.source.shape[1] + batch.targets.shape[1]) for batch in drawn) < 256
    assert len({tuple(i for i in row if i != NOTHING) for row in epochs[0]}) == len(pairs)
    assert epochs[0] != epochs[1]


def test_smoothed_loss_is_torchs_with_its_gradients() -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(20, (9,))
    ours = cross_entropy(hidden, weight, targets, 0.1)
    theirs = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes)


def test_the_loss_of_a_padded_batch_is_that_of_its_pairs() -> None:
    decoder = random_decoder(VANILLA)
    data = PairData([[5, 6, 7, 8, 0], [9, 0], [10, 11, 0]], [[20, 0], [21, 22, 23, 0], [24, 25, 0]], start_id=0)
    total = 0.0
    for source, target in zip(data.sources, data.targets, strict=True):
        logits = dense_logits(decoder, [source], [[0, *target[:-1]]])[0]
        total += F.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
    assert pair_loss(decoder, data.batch([0, 1, 2])).item() == pytest.approx(total / 9, rel=1e-4)


def test_the_rate_warms_up_and_falls_with_the_inverse_root(build: Build) -> None:
    config = build(warmup=100, lr=1.0)
    assert learning_rate(config, 49) == pytest.approx(0.5)
    assert learning_rate(config, 399) == pytest.approx(0.5)
    assert learning_rate(config, 99) == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["transformer", "t5"])
def test_a_run_learns_and_its_folder_is_a_network_to_serve(build: Build, family: str) -> None:
    config = build(family=family, steps=60)
    train(config, silent)
    rows = losses(config)
    assert float(rows[-1][2]) < 0.7 * float(rows[3][2])
    shape = read_config(config.out)
    decoder = load_decoder(config.out, shape, torch.float32, torch.device("cpu"))
    tokenizer = Tokenizer.load(config.out)
    assert (shape.start_id, shape.eos_ids, read_generation_defaults(config.out).temperature) == (0, (0,), 0.0)
    source, target = tokenizer.encode("red fox"), tokenizer.encode("RED FOX")
    assert source[-1] == target[-1] == 0
    before = F.cross_entropy(random_logits(len(target), shape.vocab_size), torch.tensor(target))
    after = F.cross_entropy(dense_logits(decoder, [source], [[0, *target[:-1]]])[0], torch.tensor(target))
    assert after < 0.7 * before


def random_logits(num: int, vocab: int) -> torch.Tensor:
    return torch.zeros(num, vocab)


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(build: Build, tmp_path: Path) -> None:
    whole = build(out=tmp_path / "whole")
    train(whole, silent)
    cut = build(out=tmp_path / "cut", steps=4)
    train(cut, silent)
    train(replace(cut, steps=8), silent)
    assert [row[:2] for row in losses(whole)] == [row[:2] for row in losses(cut)]


def test_pairs_are_for_those_who_read_sources(build: Build) -> None:
    with pytest.raises(OptionError, match="pairs and --encoder-layers"):
        build(family="llama", target="answers")
    with pytest.raises(OptionError, match="num-kv-heads"):
        build(num_kv_heads=2)
