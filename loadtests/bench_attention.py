"""Kinds of layers side by side: one network for each, alike in parameters, data and tokens it learns from.

    python -m loadtests.bench_attention --stories DIR --wikitext DIR --out build/attention

It trains what is not trained yet (a run that was killed goes on), and then writes `table.md`, `table.json` and two
plots: memory of a stream and tokens/s, by length from 1,024 to 65,536 tokens. Times belong to this machine, and are
measured in the plain runner for every kind.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer as Library

from loadtests.attention.lengths import LENGTHS, Measured, measure
from loadtests.attention.plots import draw
from model.families.registry import read_config
from model.nn.decoder import Decoder, num_parameters
from model.training.data import Ids
from model.training.evaluate import Evaluator
from model.training.options import TrainConfig
from model.training.runlog import read_log
from model.training.trainer import prepare, train
from model.weights import load_decoder

KINDS = {
    "full": "full",
    "window": "window:128",
    "window, global, random": "window:128:4:4",
    "recurrent memory": "recurrent-memory:64:64",
    "linear": "linear:64",
    "LSTM": "lstm:36",
    "window and linear": "window:128,linear:64",
}
CONTEXT, STREAM = 512, 8192
SIZES = {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 2048, "context": CONTEXT}
PACE = {"optimizer": "muon", "batch_tokens": 2048, "lr": 3e-3, "warmup": 30, "device": "cpu", "dtype": "float32"}
INNER = 192


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_config(data: Path, out: Path, word: str, steps: int) -> TrainConfig:
    """The run of one kind: the MLPs take what a kind's own parameters are more or fewer than full attention's."""

    def make(attention: str, inner: int) -> TrainConfig:
        own = {"attention": attention, "intermediate_size": inner, "steps": steps, "eval_every": steps}
        return TrainConfig(data, out, **{**SIZES, **PACE, **own}, save_every=50)  # type: ignore[arg-type]

    def size(config: TrainConfig) -> int:
        with torch.device("meta"):
            return num_parameters(Decoder(config.network(SIZES["vocab_size"])))

    wanted, found = size(make("full", INNER)), size(make(word, INNER))
    fewer = round((found - wanted) / (3 * SIZES["hidden_size"] * SIZES["num_layers"]))
    return make(word, INNER - fewer)


def wikitext(source: Path, out: Path) -> Path:
    """A folder with the text to train on and the one to validate on. Without a train file the test file is trained
    on, which is said in the table."""
    out.mkdir(parents=True, exist_ok=True)
    name = next((n for n in ("train.txt", "wiki.train.tokens", "test.txt") if (source / n).exists()), None)
    if name is None:
        raise SystemExit(f"--wikitext {source}: found neither train.txt nor test.txt")
    (out / "train.txt").write_bytes((source / name).read_bytes())
    (out / "valid.txt").write_bytes((source / "valid.txt").read_bytes())
    (out / "source").write_text(name)
    return out


def streamed(config: TrainConfig, ids: Ids, tokenizer: Library) -> float:
    """Bits per byte when texts are read in streams of STREAM tokens instead of windows."""
    decoder = load_decoder(config.out, read_config(config.out), torch.float32, torch.device("cpu"))
    evaluator = Evaluator(decoder, tokenizer, ids, STREAM, 1, map)
    return evaluator.validate()["valid_bits_per_byte"]


def share_text(config: TrainConfig, prepared: Path) -> None:
    """Tokenizer and tokenised text are the same for all kinds: they are made once."""
    run = config.out / "run"
    if not prepared.exists():
        partial = prepared.with_suffix(".part")
        partial.mkdir(parents=True, exist_ok=True)
        prepare(config, partial, say)
        partial.rename(prepared)
    run.mkdir(parents=True, exist_ok=True)
    for file in sorted(prepared.iterdir()):
        if not (run / file.name).exists():
            (run / file.name).hardlink_to(file)


def learnt(name: str, config: TrainConfig, prepared: Path, num_words: int | None) -> dict[str, float]:
    """Train, unless it is done, and what came of it."""
    say(f"== {name}: {config.out}")
    share_text(config, prepared)
    train(config, say)
    lesson = prepare(config, config.out / "run", say)
    tokenizer, valid_ids = lesson.tokenizer, lesson.valid_ids
    last = list(read_log(config.out / "run" / "loss.csv"))[-1]
    row: dict[str, float] = {
        "parameters": num_parameters(Decoder(config.network(tokenizer.get_vocab_size()))),
        "tokens": config.steps * config.batch_tokens,
    }
    row |= {"seconds": float(last["seconds"]), "bits_per_byte": float(last["valid_bits_per_byte"])}
    if num_words:
        row["word_perplexity"] = math.exp(float(last["valid_nats"]) * (len(valid_ids) - 1) / num_words)
    elif read_config(config.out).longest > STREAM:
        row["streamed_bits_per_byte"] = streamed(config, valid_ids, tokenizer)
    return row


def count_words(file: Path) -> int:
    """Words, with one more for the end of each line, as perplexities on WikiText-2 are told."""
    text = file.read_text(encoding="utf-8")
    return len(text.split()) + text.count("\n")


def learn(args: argparse.Namespace, name: str, word: str) -> dict[str, float]:
    """What one kind learns from each text that was given."""
    folder, row = args.out / name.replace(", ", "-").replace(" ", "-").lower(), dict[str, float]()
    if args.stories:
        config = run_config(args.stories, folder / "stories", word, args.steps)
        row = learnt(name, config, args.out / "stories-text", None)
    if args.wikitext:
        wiki = wikitext(args.wikitext, args.out / "wikitext")
        config = run_config(wiki, folder / "wikitext", word, args.wikitext_steps)
        found = learnt(name, config, args.out / "wikitext-text", count_words(wiki / "valid.txt"))
        row["word_perplexity"] = found["word_perplexity"]
    return row


def table(learning: Mapping[str, Mapping[str, float]], costs: Mapping[str, Sequence[Measured]]) -> Iterator[str]:
    """Lines of Markdown; what is not known is a dash."""
    heads = ("parameters", "bits/byte", "as a stream", "words' perplexity")
    yield f"| layers | {' | '.join(heads)} | KiB at 1 k | at 64 k | tokens/s at 1 k | at 64 k |"
    yield "| --- |" + " ---: |" * 8
    columns = (("parameters", ",.0f"), ("bits_per_byte", ".3f"), ("streamed_bits_per_byte", ".3f"))
    for name in KINDS:
        row, found = learning.get(name, {}), costs.get(name, ())
        cells = [format(row[key], how) if key in row else "-" for key, how in (*columns, ("word_perplexity", ".1f"))]
        ends = [next((p for p in found if p.num_tokens == length), None) for length in (LENGTHS[0], LENGTHS[-1])]
        cells += [f"{point.num_bytes / 2**10:,.0f}" if point else "-" for point in ends]
        cells += [f"{1e3 / point.cpu_ms:,.0f}" if point else "-" for point in ends]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, help="folder with train*.txt(.xz) and valid*.txt(.xz)")
    parser.add_argument("--wikitext", "--data", type=Path, help="folder with train.txt (else test.txt) and valid.txt")
    parser.add_argument("--out", type=Path, default=Path("build/attention"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--wikitext-steps", type=int, default=600)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--only", nargs="*", choices=tuple(KINDS), default=tuple(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    known = args.out / "table.json"
    figures = json.loads(known.read_text()) if known.exists() else {"learning": {}, "costs": {}}
    for name in args.only:
        row = learn(args, name, KINDS[name])
        if row:
            figures["learning"][name] = row
            say(f"{name}: {json.dumps(row)}")
        if args.lengths:
            shape = run_config(Path(), Path(), KINDS[name], 1).network(SIZES["vocab_size"])
            figures["costs"][name] = [asdict(point) for point in measure(shape, args.lengths)]
            say(f"{name}: {json.dumps(figures['costs'][name])}")
        known.write_text(json.dumps(figures, indent=1) + "\n")
    costs = {name: [Measured(**point) for point in points] for name, points in figures["costs"].items()}
    lines = "\n".join(table(figures["learning"], costs))
    (args.out / "table.md").write_text(lines + "\n")
    say(lines)
    draw(costs, args.out)


if __name__ == "__main__":
    main()
