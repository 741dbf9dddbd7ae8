"""`make bench-perplexity`: what a number format costs in quality and brings in speed.

    python -m loadtests.perplexity --model path/to/folder --data text.txt

The text is cut into windows that do not overlap; each begins without a past, with the mark that begins a text where the
model has one. Every format computes every window before the next one's turn, and then decodes in turn, so that a noisy
machine disturbs all alike. A format's differences are to the first one. Windows are computed by the PyTorch forward
pass, streams decoded by the engine that would serve them. Perplexities per token compare only models of one tokenizer,
bits per byte any.

The default text is the beginning of "The Cuckoo Clock" (Mrs. Molesworth, 1877; in the public domain), which the bundled
model has not been trained on.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.engine.engine import Engine
from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder, num_bytes
from model.request import Request, SamplingParams
from service.work import spare_cores

BUNDLED = Path(__file__).parent.parent / "model" / "bundled"
TEXT = Path(__file__).parent / "validation.txt"
FORMATS = ("float32", "bfloat16", "float32-int8", "bfloat16-int8")
DECODED = 48  # tokens of each stream
ROWS = 128  # of logits at a time


class Candidate:
    """A model in one number format, and what was measured of it: nats of the text, seconds of its windows, tokens/s of
    decoding by number of streams."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        dtype, _, quantize = name.partition("-")
        self.name, self.nats, self.seconds = name, 0.0, 0.0
        self.rates: dict[int, list[float]] = {num: [] for num in args.streams}
        load = partial(
            Engine.load,
            args.model,
            device=args.device,
            dtype=dtype,
            quantize=quantize or "none",
            cache_gib=args.cache_gib,
        )
        self.engine, self.served = load(native=False), load()  # the native core takes the weights for itself

    @torch.inference_mode()
    def score(self, ids: Tensor) -> None:
        """Add a window: every id but the first is predicted."""
        decoder = self.engine.runner.decoder
        assert isinstance(decoder, Decoder)
        ids = ids.to(self.engine.config.device)
        began_s = time.perf_counter()
        ops = DenseAttention(decoder.config, 1, len(ids) - 1)
        hidden = decoder(ids[:-1], torch.arange(len(ids) - 1, device=ids.device), ops)
        for at in range(0, len(hidden), ROWS):
            logits = decoder.logits(hidden[at : at + ROWS], ops).float()
            self.nats += F.cross_entropy(logits, ids[1:][at : at + ROWS], reduction="sum").item()
        self.seconds += time.perf_counter() - began_s

    def decode(self, ids: Tensor, num_streams: int) -> None:
        """Add a rate of tokens, prompts included."""
        params = SamplingParams(temperature=0.0, max_tokens=DECODED)
        prompt = tuple(ids[:32].tolist())
        began_s = time.perf_counter()
        for i in range(num_streams):
            self.served.add(Request(f"d{i}", prompt, params))
        while self.served.has_work():
            self.served.step()
        self.rates[num_streams].append(num_streams * DECODED / (time.perf_counter() - began_s))


def windows(engine: Engine, text: str, size: int, num: int | None) -> Iterator[Tensor]:
    """The first `num` windows of a text, of `size` predicted ids each; the rest that fills none is left out."""
    config = engine.runner.decoder.config
    first = [] if config.bos_id is None else [config.bos_id]
    ids = engine.tokenizer.encode(text)
    ids = ids[len(first) :] if ids[: len(first)] == first else ids
    step = size if first else size + 1
    for i in range(len(ids) // step if num is None else min(num, len(ids) // step)):
        yield torch.tensor(first + ids[i * step : (i + 1) * step])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description="Perplexity and speed of number formats.")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--data", type=Path, default=TEXT)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS[:3]), choices=FORMATS)
    parser.add_argument("--window", type=int, default=256, help="tokens predicted in one piece")
    parser.add_argument("--windows", type=int, help="how many; default: the whole text")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8], help="of the decoding; none leaves it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=spare_cores())
    parser.add_argument("--cache-gib", type=float, default=0.25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    candidates = [Candidate(args, name) for name in args.formats]
    most = candidates[0].engine.runner.decoder.config.max_position
    if not 0 < args.window <= most:
        parser.error(f"--window {args.window}: expected 1 to {most}, where the model's positions end")
    text = args.data.read_text(encoding="utf-8")
    cut = list(windows(candidates[0].engine, text, args.window, args.windows))
    if not cut:
        parser.error(f"--data {args.data}: shorter than one window of {args.window} tokens")
    for ids in (cut[0], *cut):  # the first one warms up
        for candidate in candidates:
            if ids is cut[0]:
                candidate.nats = candidate.seconds = 0.0
            candidate.score(ids)
    for _ in range(args.rounds):
        for num in args.streams:
            for candidate in candidates:
                candidate.decode(cut[0], num)
    num_tokens = sum(len(ids) - 1 for ids in cut)
    known = sum(len(candidates[0].engine.tokenizer.decode(ids[1:].tolist()).encode()) for ids in cut)
    print(f"{args.data.name}: {len(cut)} windows of {args.window} tokens, {known:,} bytes")
    heads = "".join(f"   decode {num:>2}, tok/s" for num in args.streams)
    print(f"{'numbers':14} {'MiB':>7}   perplexity   difference   bits/byte   windows, tok/s{heads}")
    base = math.exp(candidates[0].nats / num_tokens)
    for each in candidates:
        found = math.exp(each.nats / num_tokens)
        rates = "".join(f"{statistics.median(told):19.0f}" for told in each.rates.values())
        mib, bits = num_bytes(each.engine.runner.decoder) / 2**20, each.nats / math.log(2) / known
        speed = num_tokens / each.seconds
        print(f"{each.name:14} {mib:7.1f} {found:12.4f} {found / base - 1:+12.3%} {bits:11.4f} {speed:16.0f}{rates}")


if __name__ == "__main__":
    main()
