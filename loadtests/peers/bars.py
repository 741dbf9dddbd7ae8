"""What has been promised against each peer, and what a measured point proves of it.

A point's turns are alternated, so a ratio is the median over the turns of ours by theirs. Nothing here measures.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.peers.contenders import Run

OURS, BARE = "millrace", "millrace engine"
LLAMA, OPENVINO, TRANSFORMERS = "llama-server", "OpenVINO GenAI", "transformers"
NAMES = (OURS, LLAMA, BARE, OPENVINO, TRANSFORMERS)

SERVED = {  # output tokens/s, ours by llama-server's, for each size and number of streams
    "S": {1: 1.5, 8: 2.5, 32: 3.5},
    "M": {1: 1.3, 8: 2.0, 32: 2.0},
    "L": {1: 1.0, 8: 1.3, 32: 1.3},
}
ROOF = {"M": 0.85, "L": 0.85}  # share of the memory roofline at one stream


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender's go: the whole load, and the same number of other prompts with one new token each."""

    full: Run
    first: Run


@dataclass(slots=True)
class Point:
    """Everything measured at one size, precision and number of streams; `sweeps` are bytes per second, and
    `roof_tokens_per_s` what reading at the best of them would allow."""

    size: str
    dtype: str
    num_streams: int
    num_prompt: int
    num_new: int
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    sweeps: list[float] = field(default_factory=list)
    step_bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)  # contender -> why

    def output_rate(self, turn: Turn) -> float:
        """Output tokens/s of all streams, the prompts' time included."""
        return self.num_streams * self.num_new / turn.full.seconds

    def prefill_rate(self, turn: Turn) -> float:
        """Prompt tokens/s of the load with one new token."""
        return self.num_streams * self.num_prompt / turn.first.seconds

    def decode_rate(self, turn: Turn) -> float:
        """Output tokens/s after the prompts: where first tokens were seen, from the last of them on; else from the
        time that the load with one token takes."""
        run, num_later = turn.full, self.num_streams * (self.num_new - 1)
        if run.first_s is not None:
            return run.num_later / max(1e-9, run.seconds - run.first_s)
        return num_later / max(1e-9, run.seconds - turn.first.seconds)

    def median(self, name: str, figure: Callable[[Turn], float]) -> float:
        """Over the turns of one contender."""
        return statistics.median(map(figure, self.turns[name]))

    def ratio(self, ours: str, theirs: str, figure: Callable[[Turn], float]) -> float | None:
        """Median over the turns; None: one of them was not measured."""
        pairs = list(zip(self.turns.get(ours, ()), self.turns.get(theirs, ()), strict=False))
        return statistics.median(figure(a) / figure(b) for a, b in pairs) if pairs else None

    def roof_share(self) -> float | None:
        """How much of the memory's bandwidth our bare decoding uses, if it reads no more than it must."""
        if not self.sweeps or not self.turns.get(BARE):
            return None
        return self.median(BARE, self.decode_rate) * self.step_bytes / max(self.sweeps)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise: `value` must be at least (or `at_most`) `bar`. None: it could not be measured, `why`."""

    what: str
    value: float | None
    bar: float
    at_most: bool = False
    why: str = ""

    @property
    def is_met(self) -> bool | None:
        """None: not proved either way."""
        if self.value is None:
            return None
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def ttft_s(turn: Turn) -> float:
    """Median over the streams of a turn."""
    return quantile(turn.full.ttfts_s, 0.5)


def gap_s(turn: Turn) -> float:
    """The 99th percentile of the waits between tokens of a turn."""
    return quantile(turn.full.gaps_s, 0.99)


def verdicts(point: Point) -> list[Verdict]:
    """Every promise that concerns this point."""
    found: list[Verdict] = []

    def versus(
        what: str, ours: str, theirs: str, figure: Callable[[Turn], float], bar: float, at_most: bool = False
    ) -> None:
        why = next((f"{name}: {point.left_out[name]}" for name in (ours, theirs) if name in point.left_out), "not run")
        found.append(Verdict(what, point.ratio(ours, theirs, figure), bar, at_most, why))

    num = point.num_streams
    if num in SERVED.get(point.size, {}):
        versus("output, served, by llama-server", OURS, LLAMA, point.output_rate, SERVED[point.size][num])
    versus("prefill, served, by llama-server", OURS, LLAMA, point.prefill_rate, 1.0)
    if num == 32:
        versus("TTFT p50, served, by llama-server", OURS, LLAMA, ttft_s, 0.5, at_most=True)
        versus("inter-token p99, served, by llama-server", OURS, LLAMA, gap_s, 1.0, at_most=True)
    versus("output, engine, by OpenVINO GenAI", BARE, OPENVINO, point.output_rate, 1.0)
    versus("prefill, engine, by OpenVINO GenAI", BARE, OPENVINO, point.prefill_rate, 0.9)
    versus("output, served, by transformers bf16", OURS, TRANSFORMERS, point.output_rate, 2.0)
    if num == 1 and point.size in ROOF:
        why = point.left_out.get(BARE) or point.left_out.get("sweep", "not run")
        found.append(Verdict("share of the memory roofline, engine", point.roof_share(), ROOF[point.size], why=why))
    return found


def doubts(point: Point, num_threads: int) -> list[str]:
    """What makes a point hard to believe, in words."""
    said: list[str] = []
    for name, turns in point.turns.items():
        lengths = {len(ids) for turn in turns for ids in turn.full.token_ids}
        if lengths != {point.num_new}:
            said.append(f"{name} made {sorted(lengths)} tokens a stream, not {point.num_new}")
        foreign = statistics.median(turn.full.foreign for turn in turns)
        if foreign > 0.1:
            said.append(f"while {name} ran, other processes took {foreign:.2f} cores")
        cores = max(turn.full.cores for turn in turns)
        if cores > num_threads + 0.25:
            said.append(f"{name} kept {cores:.2f} cores busy, more than {num_threads}")
    share = point.roof_share()
    if share is not None and share > 1:
        said.append(f"a roofline share of {share:.0%}: the sweep is slower than memory, or weights stay in a cache")
    return said + disagreements(point.turns)


def disagreements(turns: Mapping[str, Sequence[Turn]]) -> list[str]:
    """Whose first tokens are others than our server's: a few may be in low precision, and chance takes a few more."""
    said: list[str] = []
    ours = turns.get(OURS) or turns.get(BARE) or ()
    for name, theirs in turns.items():
        pairs = [
            (a[0], b[0])
            for mine, other in zip(ours, theirs, strict=False)
            for a, b in zip(mine.full.token_ids, other.full.token_ids, strict=True)
        ]
        same = sum(a == b for a, b in pairs)
        if same + 2 < 0.75 * len(pairs):
            said.append(f"{name}: only {same} of {len(pairs)} first tokens are ours; is it the same network?")
    return said
