"""Training a classifier: the parts of a table, hidden words, a whole run, its resumption, and what is exported."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from model.engine.engine import Engine
from model.request import Request, SamplingParams
from model.tokenizer import Tokenizer
from model.training.baseline import bag_of_words
from model.training.classify import train_classifier
from model.training.labelled import CONTROL, SPECIAL, Labelled, load_labelled, masked, thinned, train_word_pieces
from model.training.options import OptionError, TrainConfig
from model.training.runlog import read_log

MASK = SPECIAL.index("[MASK]")
Build = Callable[..., TrainConfig]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A run of seconds over texts that one word decides."""
    draws = np.random.default_rng(0)
    words = ["the", "room", "was", "by", "a", "river", "and", "we", "stayed", "酒", "店"]
    with (tmp_path / "texts.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["label", "review"])
        for i in range(240):
            text = [*draws.choice(words, 6), "good" if i % 2 else "bad", *draws.choice(words, 3)]
            writer.writerow(["yes" if i % 2 else "no", " ".join(text)])

    def make(**changes: object) -> TrainConfig:
        sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 300, "context": 32}
        pace = {"batch_tokens": 512, "steps": 160, "warmup": 5, "lr": 2e-3, "eval_every": 20, "masked_fraction": 0.1}
        where = {"data": tmp_path / "texts.csv", "out": tmp_path / "out", "device": "cpu", "save_every": 10}
        kind = {"task": "classify", "family": "bert", "valid_fraction": 0.1, "test_fraction": 0.2, "dtype": "float32"}
        return TrainConfig(**{**sizes, **pace, **where, **kind, **changes})  # type: ignore[arg-type]

    return make


def test_a_run_learns_exports_and_is_served(build: Build) -> None:
    config, lines = build(), list[str]()
    train_classifier(config, lines.append)
    result = json.loads((config.out / "run" / "result.json").read_text())
    assert result["accuracy"] > 0.95 > result["majority"] + 0.1 and result["texts"] > 20
    assert result["bag_of_words"] > 0.95, "one word decides"
    engine = Engine.load(config.out, dtype="float32")
    assert engine.runner.decoder.config.labels == ("no", "yes")
    for word, likelier in (("bad", 0), ("good", 1)):
        ids = tuple(engine.tokenizer.encode(f"the room was {word} and we stayed"))
        engine.add(Request(word, ids, SamplingParams(max_tokens=0), task="classify"))
        [delta] = engine.step()
        chances = np.frombuffer(delta.result, dtype="<f4")
        assert chances.argmax() == likelier and abs(chances.sum() - 1) < 1e-6


def test_a_run_that_was_stopped_goes_on_as_it_would_have(build: Build) -> None:
    whole, halves = build(steps=24), build(steps=24, out=build().out / "halves")
    train_classifier(whole, lambda line: None)
    # The library breaks ties between pieces anew in each run: both go on with one tokenizer, as a resumed run does.
    (halves.out / "run").mkdir(parents=True)
    (halves.out / "run" / "tokenizer.json").write_bytes((whole.out / "run" / "tokenizer.json").read_bytes())
    stopped = [0]

    def stop(line: str) -> None:
        stopped[0] += 1
        if stopped[0] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(halves, stop)
    train_classifier(halves, lambda line: None)
    losses = [[row["train_nats"] for row in read_log(each.out / "run" / "loss.csv")] for each in (whole, halves)]
    assert losses[0] == losses[1] and len(losses[0]) == 24


def test_a_text_is_in_one_part_whatever_stands_around_it(build: Build, tmp_path: Path) -> None:
    split = load_labelled(build().data, 0.1, 0.2)
    lines = build().data.read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    again = load_labelled(tmp_path / "other.csv", 0.1, 0.2)
    assert {k: sorted(v) for k, v in asdict(split).items()} == {k: sorted(v) for k, v in asdict(again).items()}
    assert not {text for _, text in split.train} & {text for _, text in split.test}


def test_hidden_words_are_hidden_as_bert_has_it() -> None:
    ids = np.full(20_000, 7)
    ids[::100] = 2
    seen, hidden = masked(ids, 50, np.random.default_rng(1))
    assert 0.14 < hidden.mean() < 0.16 and not hidden[::100].any() and (seen[~hidden] == ids[~hidden]).all()
    assert 0.78 < (seen[hidden] == MASK).mean() < 0.82 and seen[hidden].max() > 40 and seen.min() == 2
    assert (seen[hidden] >= CONTROL - 1).all() and (thinned(ids, 0.1, np.random.default_rng(1)) == MASK).mean() > 0.08


def test_texts_are_cut_at_the_end_but_for_the_token_that_closes_them(build: Build) -> None:
    rows = load_labelled(build().data, 0.1, 0.2).train
    tokenizer = train_word_pieces([text for _, text in rows], 300)
    cut = Labelled.of(rows, ("no", "yes"), tokenizer, 6)
    assert {len(text) for text in cut.texts} == {6} and {int(text[-1]) for text in cut.texts} == {
        SPECIAL.index("[SEP]")
    }
    assert Tokenizer(tokenizer).decode(tokenizer.encode("the room").ids) == "the room"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "llama"}, "--family llama: not with --task classify"),
        ({"workers": 2}, "--workers: not with --task classify"),
        ({"masked_fraction": 1.0}, "--masked-fraction 1.0"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(build: Build, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n1,2\n", "found the columns a, b"), ("label,text\n1,x\n", "expected some of each"), ("", "columns")],
)
def test_tables_that_cannot_be_used_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(OptionError, match=message):
        load_labelled(tmp_path / "t.csv", 0.1, 0.1)


def test_words_alone_do_not_tell_what_their_order_tells() -> None:
    draws = np.random.default_rng(5)
    labels = draws.integers(0, 2, 300)
    texts = [np.array([9, 7, 8, 9] if label else [9, 8, 7, 9]) for label in labels]
    cuts = (slice(0, 200), slice(200, 250), slice(250, 300))
    train, valid, test = (Labelled(texts[cut], labels[cut]) for cut in cuts)
    assert bag_of_words(train, valid, test) < 0.7
    assert bag_of_words(train, valid, test, pairs=True) == 1.0
