"""Replay a trace of requests through the real block pool and scheduler, and see how much of the prompts is found.

    python -m loadtests.replay_cache path/to/conversation_trace.jsonl --scale 8
    python -m loadtests.replay_cache path/to/AzureLLMInferenceTrace_conv.csv

Nothing is computed but who is seated, in which blocks, and what is found; beside it a simulation of an LRU cache of the
same block size and capacity that knows no scheduler. Mooncake's traces tell prompts as hashes of blocks of 512 tokens
(https://github.com/kvcache-ai/Mooncake): one hash stands for 512 / scale ids here. Azure's tell lengths only
(https://github.com/Azure/AzurePublicDataset), so each is a new turn of one of a number of conversations that `--talks`
sets: a prompt is the longest of those it can continue, and new ids after that.

Ids never repeat but where the trace says so. Outputs are ids of their own, and part of what is found later only where a
conversation goes on, as in the service.
"""

import argparse
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from loadtests.load import traces
from model.cache.names import following, root
from model.config import EngineConfig
from model.engine.scheduler import Scheduler
from model.engine.sequence import Sequence as Generated
from model.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a trace."""

    arrives_s: float
    prompt: tuple[int, ...]
    num_output: int


@dataclass(frozen=True, slots=True)
class Found:
    """Prompt tokens in all, those found in the cache, and how often sequences were preempted."""

    num_asked: int
    num_found: int
    num_preemptions: int = 0

    @property
    def rate(self) -> float:
        return self.num_found / max(1, self.num_asked)


def mooncake(path: Path, scale: int) -> Iterator[Asked]:
    """Prompts of 1 / `scale` of their length; equal hashes are equal ids."""
    size = traces.HASHED // scale
    with path.open() as lines:
        for one in traces.mooncake(lines):
            length = max(1, one.num_prompt // scale)
            prompt = tuple(each * size + at for each in one.hash_ids for at in range(size))[:length]
            yield Asked(one.at_s, prompt, max(1, one.num_output // scale))


def azure(path: Path, scale: int, num_talks: int) -> Iterator[Asked]:
    """Lengths as conversations that go on: which one is drawn, from those that are shorter than the prompt."""
    rng, talks, next_id = random.Random(0), deque[tuple[int, ...]](maxlen=num_talks), 0
    with path.open() as lines:
        for one in traces.azure(lines):
            length = max(1, one.num_prompt // scale)
            shorter = [talk for talk in talks if len(talk) < length]
            begun = rng.choice(shorter) if shorter else ()
            prompt = (*begun, *range(next_id, next_id := next_id + length - len(begun)))
            if begun:
                talks.remove(begun)
            talks.append(prompt)
            yield Asked(one.at_s, prompt, max(1, one.num_output // scale))


def replay(trace: Iterable[Asked], config: EngineConfig, step_s: float) -> Found:
    """Through the scheduler, with steps of one length. Outputs have ids that no prompt has."""
    scheduler, asked, now_s, output = Scheduler(config), deque(trace), 0.0, 2**31
    begins_s = asked[0].arrives_s
    num_added = 0
    while asked or scheduler.has_work:
        if not scheduler.has_work:
            now_s = max(now_s, asked[0].arrives_s - begins_s)
        while asked and asked[0].arrives_s - begins_s <= now_s:
            one = asked.popleft()
            request = Request(str(num_added), one.prompt, SamplingParams(max_tokens=one.num_output))
            scheduler.add(Generated(request, config.max_model_len))
            num_added += 1
        plan = scheduler.plan()
        drawn = {}
        for chunk in plan.chunks:
            if chunk.draws:
                output += 1
                drawn[chunk.sequence.id] = output
        scheduler.commit(plan, drawn)
        now_s += step_s
    prefixes = scheduler.prefixes
    return Found(prefixes.num_asked, prefixes.num_found, scheduler.num_preemptions)


def simulate(trace: Iterable[Asked], block_size: int, capacity: int) -> Found:
    """An LRU cache of named blocks, one request after the other; the last token of a prompt is never found."""
    cache: OrderedDict[bytes, None] = OrderedDict()
    num_asked = num_found = 0
    for one in trace:
        names, name = list[bytes](), root("default", "")
        for at in range(0, len(one.prompt) // block_size * block_size, block_size):
            name = following(name, one.prompt[at : at + block_size])
            names.append(name)
        num_hits = 0
        while num_hits < (len(one.prompt) - 1) // block_size and names[num_hits] in cache:
            num_hits += 1
        num_asked += len(one.prompt)
        num_found += num_hits * block_size
        # What its output fills takes room too. The beginning counts as used last: without it the rest is of no use.
        rest = (len(one.prompt) + one.num_output - 1) // block_size - len(names)
        extra = [b"%d %d" % (num_asked, at) for at in range(rest)]
        for name in reversed(names + extra):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return Found(num_asked, num_found)


def read(path: Path, scale: int, num_talks: int, most: int) -> list[Asked]:
    """The trace in a file, by the file's form."""
    trace = azure(path, scale, num_talks) if path.suffix == ".csv" else mooncake(path, scale)
    return list(islice(trace, most))


def main(argv: Sequence[str] | None = None) -> None:
    """Both rates for each capacity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--scale", type=int, default=8, help="lengths are divided by this; for Mooncake, 512 must be")
    parser.add_argument("--requests", type=int, default=10**6, help="at most so many")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, nargs="+", default=[16_384, 65_536, 262_144], help="capacities")
    parser.add_argument("--seats", type=int, default=32, help="sequences computed in one step")
    parser.add_argument("--step-s", type=float, default=0.02, help="how long a step takes")
    parser.add_argument("--talks", type=int, default=256, help="conversations under way, for traces of lengths only")
    args = parser.parse_args(argv)
    trace = read(args.trace, args.scale, args.talks, args.requests)
    longest = max(len(one.prompt) + one.num_output for one in trace)
    print(f"{args.trace.name}: {len(trace):,} requests, {sum(len(one.prompt) for one in trace):,} prompt tokens")
    for num_blocks in args.blocks:
        config = EngineConfig(
            max_model_len=longest + 1,
            max_num_seqs=args.seats,
            max_batch_tokens=2048,
            block_size=args.block_size,
            num_blocks=num_blocks,
        )
        real, ideal = replay(trace, config, args.step_s), simulate(trace, args.block_size, num_blocks)
        assert real.num_asked == ideal.num_asked, (real, ideal)
        print(
            f"{num_blocks:9,} blocks   scheduler {real.rate:7.2%}   LRU {ideal.rate:7.2%}   "
            f"difference {100 * (real.rate - ideal.rate):+.2f} points   preemptions {real.num_preemptions}",
            flush=True,
        )


if __name__ == "__main__":
    main()
