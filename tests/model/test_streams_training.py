"""Every kind of layer from `--attention` to a served folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import CheckpointError, EngineConfigError
from model.engine.engine import Engine
from model.engine.runner import Runner
from model.engine.sizing import size_engine
from model.families.registry import read_config
from model.families.streams import STREAMS
from model.nn.decoder import Decoder
from model.request import Request, SamplingParams
from model.training.loss import next_token_loss
from model.training.options import OptionError, TrainConfig
from model.training.trainer import train
from tests.model.helpers_streams import WORDS, parallel, shape
from tests.model.test_engine import outputs
from tests.model.test_training import losses, silent


def tiny(folder: Path, word: str, **changes: object) -> TrainConfig:
    """A run of a second over a text that is easily learnt."""
    text = "The fox ran to the river. The cat saw the fox and sat by the river.\n\n" * 12
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join([text] * 12))
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 280, "context": 64}
    pace = {"batch_tokens": 256, "steps": 12, "warmup": 2, "lr": 1e-2, "eval_every": 12, "device": "cpu"}
    values = {"attention": word, **sizes, **pace, "save_every": 6, "dtype": "float32", **changes}
    return TrainConfig(folder / "text.txt", folder / "out", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", WORDS)
def test_every_kind_trains_exports_loads_and_is_served(tmp_path: Path, word: str) -> None:
    config = tiny(tmp_path, word)
    train(config, silent)
    first, last = (float(losses(config)[at][1]) for at in (0, -1))
    assert last < first - 0.5
    engine = Engine.load(config.out, device="cpu", max_num_seqs=2)
    assert isinstance(engine.runner, Runner)
    assert [kind.word for kind in read_config(config.out).attention] == json.loads(
        (config.out / "config.json").read_text()
    )["attention"]
    prompt = engine.tokenizer.encode("The fox ran to the")
    [ids] = outputs(engine, [Request("a", tuple(prompt), SamplingParams(max_tokens=8, temperature=0.0))]).values()
    whole = [*prompt, *ids]
    assert parallel(engine.runner.decoder, whole)[len(prompt) - 1 : -1].argmax(-1).tolist() == list(ids)


def test_a_stream_goes_far_beyond_what_it_was_trained_for(tmp_path: Path) -> None:
    config = tiny(tmp_path, "window:16:2:1,linear:16,recurrent-memory:16:16,lstm:16", steps=1)
    train(config, silent)
    engine = Engine.load(config.out, device="cpu", max_num_seqs=1, max_model_len=1500)
    asked = SamplingParams(max_tokens=1400, temperature=1.0, seed=3)
    assert len(outputs(engine, [Request("a", (5, 6), asked)])["a"]) == 1400
    assert engine.stats().num_blocks * engine.config.block_size < 1400


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_other_formats_of_numbers_go_on_alike(tmp_path: Path, changes: dict[str, str]) -> None:
    config = tiny(tmp_path, "window:16:2:1,linear:16,recurrent-memory:16:16,lstm:16", steps=40)
    train(config, silent)
    request = Request("a", (0, 84, 104), SamplingParams(max_tokens=40, temperature=0.0))
    exact, other = (
        outputs(Engine.load(config.out, device="cpu", max_num_seqs=2, **each), [request])["a"]  # type: ignore[arg-type]
        for each in ({"dtype": "float32"}, changes)
    )
    assert exact[:8] == other[:8]


@pytest.mark.parametrize("word", ["lstm", "window", "recurrent-memory,linear"])
def test_a_stream_of_a_million_tokens_needs_a_constant_cache(word: str) -> None:
    few, many = (
        size_engine(shape(word), device="cpu", dtype="float32", max_model_len=length, max_num_seqs=4).num_blocks
        for length in (5_000, 2**20)
    )
    assert few == many
    with pytest.raises(EngineConfigError, match="positions end at 1024"):
        size_engine(shape(f"{word},full"), device="cpu", dtype="float32", max_model_len=2000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "sparse"}, "--attention 'sparse': expected one of full"),
        ({"attention": "linear,window:0"}, "--attention 'window:0'"),
        ({"family": "gpt2", "num_kv_heads": 4}, "--attention: not in family gpt2"),
    ],
)
def test_kinds_that_are_none_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tiny(tmp_path, **{"word": "linear", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, ["linear"], ["linear", "window:-1"], "linear"])
def test_a_folder_with_other_words_is_refused(tmp_path: Path, value: object) -> None:
    raw = {**STREAMS.write_config(replace(shape("linear"), max_position=64)), "attention": value}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="attention"):
        read_config(tmp_path)


def test_gradients_reach_every_parameter() -> None:
    for word in WORDS:
        decoder = Decoder(shape(word))
        next_token_loss(decoder, torch.randint(256, (2, 64)), torch.randint(256, (2, 64))).backward()  # type: ignore[no-untyped-call]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters()), word
