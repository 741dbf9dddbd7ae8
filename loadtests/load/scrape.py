"""What the server itself says: its metrics now and then during a run, and its histograms before and after.

A histogram is compared with a client's figures in the same buckets, so that what differs is the time and not the
rounding. It draws nothing.
"""

import re
import threading
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

BUCKET = re.compile(r'^(?P<name>\w+)_bucket\{.*?le="(?P<le>[^"]+)".*\}$')
EVERY_S = 0.5
GLANCED = ("millrace_requests_waiting", "millrace_requests_running", "millrace_cache_use_ratio")
TTFT, ITL = "millrace_time_to_first_token_seconds", "millrace_inter_token_seconds"
Samples = dict[str, float]


def parsed(text: str) -> Samples:
    """Prometheus' text format: each sample by its name with labels."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def scrape(urls: Iterable[str]) -> Samples:
    """Of several processes, added up by name. Raises `OSError`."""
    added: Samples = {}
    for url in urls:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            for name, value in parsed(answer.read().decode()).items():
                added[name] = added.get(name, 0.0) + value
    return added


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in buckets up to each bound, the last one being infinite."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @property
    def num(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        return self.total / self.num if self.num else float("nan")

    def quantile(self, q: float) -> float:
        """As `histogram_quantile` has it: evenly spread within a bucket; in the last one, its lower bound."""
        wanted, below = q * self.num, 0.0
        for i, (bound, upto) in enumerate(zip(self.bounds, accumulate(self.counts), strict=True)):
            if upto >= wanted and self.counts[i]:
                low = self.bounds[i - 1] if i else 0.0
                return low if bound == float("inf") else low + (bound - low) * (wanted - below) / self.counts[i]
            below = upto
        return float("nan")

    def since(self, before: "Histogram") -> "Histogram":
        """What was added."""
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Histogram(self.bounds, counts, self.total - before.total)

    def refilled(self, values: Sequence[float]) -> "Histogram":
        """Other values in the same buckets."""
        counts = [0.0] * len(self.bounds)
        for value in values:
            counts[bisect_left(self.bounds, value)] += 1
        return Histogram(self.bounds, tuple(counts), sum(values))


def histogram(samples: Samples, name: str) -> Histogram:
    """By its name without `_bucket`. Raises `KeyError`."""
    found = ((BUCKET.match(key), value) for key, value in samples.items())
    pairs = sorted((float(match["le"]), value) for match, value in found if match and match["name"] == name)
    bounds, upto = [le for le, _ in pairs], [value for _, value in pairs]
    counts = [now - before for now, before in zip(upto, [0.0, *upto], strict=False)]
    return Histogram(tuple(bounds), tuple(counts), samples[f"{name}_sum"])


@dataclass(frozen=True, slots=True)
class Glance:
    """The queue at one time of day."""

    at_s: float
    waiting: float
    running: float
    cache_use: float


@dataclass(slots=True)
class Watch:
    """`with Watch(urls) as watch`: glances every half second, and all samples before and after. A server that does not
    answer, or has no metrics, leaves a gap."""

    urls: tuple[str, ...]
    glances: list[Glance] = field(default_factory=list)
    before: Samples = field(default_factory=dict)
    after: Samples = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        self.before = self._all()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.after = self._all()

    def spread(self, name: str) -> Histogram:
        """What came into a histogram meanwhile. Raises `KeyError`."""
        return histogram(self.after, name).since(histogram(self.before, name))

    def _all(self) -> Samples:
        try:
            return scrape(self.urls)
        except OSError:
            return {}

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            if told := self._all():
                self.glances.append(Glance(time.time(), *(told.get(name, 0.0) for name in GLANCED)))


@dataclass(frozen=True, slots=True)
class Agreement:
    """One figure from two sides: seconds, to be shown as milliseconds, or a number where there is no `unit`."""

    what: str
    ours: float
    theirs: float
    unit: str = "ms"

    @property
    def difference(self) -> float:
        """Ours against theirs, as a share."""
        return self.ours / self.theirs - 1 if self.theirs else float("nan")


def agreements(watch: Watch, values: dict[str, Sequence[float]]) -> list[Agreement]:
    """A client's durations, in seconds, by the name of the server's histogram, beside that."""
    rows = []
    for name, own in values.items():
        theirs = watch.spread(name)
        ours, short = theirs.refilled(own), name.removeprefix("millrace_").removesuffix("_seconds").replace("_", " ")
        rows.append(Agreement(f"{short}, number", ours.num, theirs.num, ""))
        rows.append(Agreement(f"{short}, mean", ours.mean, theirs.mean))
        rows += [Agreement(f"{short}, p{q * 100:g}", ours.quantile(q), theirs.quantile(q)) for q in (0.5, 0.9, 0.99)]
    return rows
