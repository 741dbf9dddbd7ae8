"""The trainer: loss and optimisers against their plain twins, a whole run, resumption after a kill, the export."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.families.registry import FAMILIES as FAMILY_FILES
from model.families.registry import read_config, read_generation_defaults
from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder
from model.tokenizer import Tokenizer
from model.training.loss import CHUNK, bits_per_byte, cross_entropy
from model.training.optimizer import make_optimizers, orthogonal
from model.training.options import FAMILIES, PAIRED, OptionError, TrainConfig, add_arguments, from_arguments
from model.training.runlog import RunLog, read_log
from model.training.trainer import initialise, learning_rate, train
from model.weights import load_decoder

Build = Callable[..., TrainConfig]
CPU = torch.device("cpu")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A run of seconds over a text that a tiny network can learn."""
    text = "The fox ran to the river. The cat saw the fox and sat by the river.\n\n" * 12
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join([text] * 12))

    def make(**changes: object) -> TrainConfig:
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 280}
        pace = {"context": 32, "batch_tokens": 128, "steps": 8, "warmup": 2, "lr": 1e-2, "eval_every": 4}
        where = {"data": tmp_path / "text.txt", "out": tmp_path / "out", "device": "cpu", "save_every": 2}
        return TrainConfig(**{**sizes, **pace, **where, **changes})  # type: ignore[arg-type]

    return make


def silent(line: str) -> None:
    """A report that nobody reads."""


def losses(config: TrainConfig) -> list[tuple[str, str, str]]:
    return [(r["step"], r["train_nats"], r["valid_nats"]) for r in read_log(config.out / "run" / "loss.csv")]


@pytest.mark.parametrize("rows", [3, CHUNK + 5])
def test_chunked_loss_is_cross_entropy_with_its_gradients(rows: int) -> None:
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(20, (rows,))
    ours, theirs = cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(2 * x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_bits_per_byte() -> None:
    assert bits_per_byte(nats=8 * math.log(2), num_bytes=4) == 2.0


def test_orthogonal_brings_singular_values_near_one() -> None:
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_every_parameter_has_one_optimizer_and_only_matrices_decay(build: Build) -> None:
    decoder = Decoder(build(family="gpt2", num_kv_heads=4).network(280))
    for name in ("adamw", "muon"):
        groups = [g for o in make_optimizers(decoder, name, 0.1) for g in o.param_groups]
        owned = [p for g in groups for p in g["params"]]
        assert sorted(map(id, owned)) == sorted(map(id, decoder.parameters()))
        assert all((p.ndim == 2) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_learning_rate_warms_up_and_falls_to_its_last_part(build: Build) -> None:
    config = build(lr=1.0, warmup=10, steps=110, final_lr=0.1)
    assert [learning_rate(config, s) for s in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)


def test_initial_loss_is_that_of_a_guess(build: Build) -> None:
    decoder = Decoder(build().network(280))
    initialise(decoder)
    ids = torch.randint(280, (32,))
    ops = DenseAttention(decoder.config, 1, 32)
    hidden = decoder(ids, torch.arange(32), ops)
    assert F.cross_entropy(decoder.logits(hidden, ops), ids.roll(1)).item() == pytest.approx(math.log(280), abs=0.3)


@pytest.mark.parametrize("changes", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"autocast": "on"}])
def test_loss_falls(build: Build, changes: dict[str, str]) -> None:
    lines: list[str] = []
    config = build(steps=30, short_context=16, eval_every=30, **changes)
    train(config, lines.append)
    rows = list(read_log(config.out / "run" / "loss.csv"))
    assert len(rows) == 30
    assert float(rows[-1]["train_nats"]) < 0.5 * float(rows[0]["train_nats"])
    assert float(rows[-1]["valid_bits_per_byte"]) < 1.5
    assert any("tokens/s" in line and "min left" in line for line in lines)
    assert any(line.startswith("  | Once upon a time") for line in lines)
    assert (config.out / "run" / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "workers": 2}, {"dropout": 0.1, "micro_tokens": 32}])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(build: Build, tmp_path: Path, changes: dict[str, object]) -> None:
    threads = torch.get_num_threads()
    whole = build(out=tmp_path / "whole", **changes)
    train(whole, silent)

    def stop(line: str) -> None:
        if line.startswith("step 5"):
            raise KeyboardInterrupt

    parts = build(out=tmp_path / "parts", report_every=1, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(parts, stop)
    train(parts, silent)
    torch.set_num_threads(threads)
    assert losses(parts) == losses(whole)
    names = "model.safetensors", "config.json", "tokenizer.json"
    assert all((whole.out / n).read_bytes() == (parts.out / n).read_bytes() for n in names)


def test_a_killed_process_goes_on_as_if_it_had_not_been(build: Build, tmp_path: Path) -> None:
    whole, killed = build(out=tmp_path / "whole", report_every=1), build(out=tmp_path / "killed", report_every=1)
    train(whole, silent)
    arguments = f"""--data {killed.data} --out {killed.out} --hidden-size 32 --num-layers 2 --num-heads 4
        --num-kv-heads 2 --vocab-size 280 --context 32 --batch-tokens 128 --steps 8 --warmup 2 --lr 1e-2
        --eval-every 4 --save-every 2 --device cpu --report-every 1"""
    command = [sys.executable, "-m", "model.training", *arguments.split()]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 5"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (killed.out / "config.json").exists()
    train(killed, silent)
    assert losses(killed) == losses(whole)


def test_accumulated_gradients_are_those_of_the_whole_batch(build: Build, tmp_path: Path) -> None:
    whole, parts = build(out=tmp_path / "whole"), build(out=tmp_path / "parts", micro_tokens=32)
    for config in (whole, parts):
        train(config, silent)
    for a, b in zip(losses(whole), losses(parts), strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), rel=1e-3)


def test_another_run_in_the_folder_is_refused(build: Build, tmp_path: Path) -> None:
    train(build(steps=1), silent)
    with pytest.raises(OptionError, match="holds a run with hidden_size 32, not 64"):
        train(build(hidden_size=64), silent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(OptionError, match="holds a model that no run"):
        train(build(out=tmp_path / "other"), silent)


def test_a_run_from_before_an_option_was_known_goes_on(build: Build) -> None:
    train(config := build(steps=1), silent)
    file = config.out / "run" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in ("task", "target")}))
    train(build(steps=2), silent)
    assert len(losses(config)) == 2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PAIRED])
def test_exported_folder_gives_the_same_logits_everywhere(build: Build, family: str) -> None:
    extra = {"num_kv_heads": 4} if family == "gpt2" else {"window": 8} if family == "mistral" else {}
    config = build(family=family, steps=2, dtype="float32", untied=family == "llama", **extra)
    train(config, silent)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    ids = tokenizer("The fox saw the cat and the river.", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == Tokenizer.load(config.out).encode("The fox saw the cat and the river.")
    theirs = AutoModelForCausalLM.from_pretrained(config.out).eval()
    ours = load_decoder(config.out, read_config(config.out), torch.float32, CPU)
    with torch.no_grad():
        ops = DenseAttention(ours.config, 1, ids.numel())
        hidden = ours(ids[0], torch.arange(ids.numel()), ops)
        torch.testing.assert_close(ours.logits(hidden, ops), theirs(ids).logits[0], atol=1e-4, rtol=1e-4)
    assert read_config(config.out) == replace(config.network(ours.config.vocab_size), dtype="float32")


def test_exported_dtype_and_sampling(build: Build) -> None:
    config = build(steps=1)
    train(config, silent)
    assert read_config(config.out).dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(config.out).dtype == torch.bfloat16
    assert read_generation_defaults(config.out).temperature == 0.7


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (["The fox ran"], "The fox ran"),
        (["Tell me of a fox!"], '"Tell me of a fox!" said the child.'),
        (
            ["Write about a fox."],
            '"Write about a fox," said the child.\n\n"Very well," said the old man. "This is the story of',
        ),
        (["The fox ran", "home.", "The cat sat"], "The fox ran home.\n\nThe cat sat"),
    ],
)
def test_a_conversation_becomes_prose(build: Build, messages: list[str], text: str) -> None:
    config = build(steps=1)
    train(config, silent)
    roles = ["user", "assistant"] * 2
    said = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    rendered = Tokenizer.load(config.out).render_chat(said)
    assert rendered.startswith("<|endoftext|>" + text)
    assert AutoTokenizer.from_pretrained(config.out).apply_chat_template(said, tokenize=False) == rendered


def test_arguments_are_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = "--data a --out b --lr 0.5 --untied --family qwen3"
    parsed = from_arguments(parser.parse_args(words.split()))
    assert parsed == TrainConfig(Path("a"), Path("b"), lr=0.5, untied=True, family="qwen3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 70_000}, "--vocab-size 70000"),
        ({"num_kv_heads": 3}, "--num-kv-heads 3: no divisor"),
        ({"family": "gpt2"}, "gpt2 has all heads"),
        ({"hidden_size": 36}, "--head-dim 9: expected an even number"),
        ({"steps": 0}, "--steps 0: expected 1 or more"),
        ({"window": 8}, "--window 8: only mistral"),
        ({"short_context": 5}, "--short-context 5"),
        ({"batch_tokens": 100}, "--batch-tokens 100"),
        ({"workers": 2, "dropout": 0.1}, "--workers 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(build: Build, changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build(**changes)


def test_a_log_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "loss.csv"
    log = RunLog(file, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "seconds": 1.5 * step, "train_nats": 1.0})
    with file.open("a") as handle:
        handle.write("4,1")
    again = RunLog(file, 2)
    assert again.seconds == 3.0
    assert [row["step"] for row in read_log(file)] == ["1", "2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("untied", [False, True])
def test_every_network_asked_for_has_a_config_file(build: Build, family: str, untied: bool) -> None:
    network = build(family=family, untied=untied, num_kv_heads=0).network(280)
    written = FAMILY_FILES[family].write_config(network)
    assert FAMILY_FILES[family].read_config(written) == network
