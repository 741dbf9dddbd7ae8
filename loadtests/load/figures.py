"""From records to figures: percentiles, goodput, whether a promise was kept, and where the knee is.

Definitions, since benchmarks differ. TTFT: from when a request was due (open loop) or sent (closed) to its first token.
Inter-token: each gap between two tokens of a stream. TPOT: the mean gap of one stream, as in vLLM's benchmark, which
leaves out the first token. Throughput: tokens that came in a time, by that time. Goodput: requests a second whose own
TTFT and TPOT are within the SLO. A stream that was left on purpose is no error. It reads no files and draws nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loadtests.load.records import OK, Record

FloatArray = NDArray[np.float64]
QUANTILES = (0.5, 0.9, 0.95, 0.99)
LATE_S = 0.05  # a client whose p99 is later than this measures itself


@dataclass(frozen=True, slots=True)
class Spread:
    """A sample's mean and quantiles; of none, nothing is known (NaN)."""

    num: int
    mean: float
    quantiles: dict[float, float]

    @staticmethod
    def of(values: Iterable[float]) -> "Spread":
        """All of them, unrounded."""
        sample = np.fromiter(values, float)
        if not len(sample):
            return Spread(0, float("nan"), dict.fromkeys(QUANTILES, float("nan")))
        found = np.quantile(sample, QUANTILES)
        return Spread(len(sample), float(sample.mean()), dict(zip(QUANTILES, map(float, found), strict=True)))


@dataclass(frozen=True, slots=True)
class Slo:
    """A promise about the 99th percentiles, in seconds, and the share of requests that may fail."""

    ttft_s: float = 1.0
    itl_s: float = 0.1
    errors: float = 0.01

    @staticmethod
    def parse(text: str) -> "Slo":
        """`ttft:1000,itl:100,errors:0.01`, in milliseconds; what is absent is the default. Raises `ValueError`."""
        told = dict(part.split(":") for part in text.split(",") if part)
        if unknown := set(told) - {"ttft", "itl", "errors"}:
            raise ValueError(f"--slo: no {', '.join(sorted(unknown))}; there are ttft, itl, errors")
        default = Slo()
        return Slo(
            float(told.get("ttft", default.ttft_s * 1e3)) / 1e3,
            float(told.get("itl", default.itl_s * 1e3)) / 1e3,
            float(told.get("errors", default.errors)),
        )

    def broken(self, told: "Summary") -> list[str]:
        """What was not kept, in words. A run without an answer keeps nothing."""
        if not told.num_ok:
            return ["no request came to a good end"]
        lines = []
        for name, spread, limit_s in (("TTFT", told.ttft, self.ttft_s), ("inter-token", told.itl, self.itl_s)):
            if (p99_s := spread.quantiles[0.99]) > limit_s:
                lines.append(f"{name} p99 {p99_s * 1e3:.0f} ms, promised {limit_s * 1e3:.0f} ms")
        if told.error_share > self.errors:
            lines.append(f"errors {told.error_share:.1%}, promised {self.errors:.1%}")
        return lines

    def is_good(self, record: Record) -> bool:
        """Whether one request got what is promised."""
        ttft_s, tpot_s = record.felt_ttft_s, record.tpot_s
        return not record.is_error and ttft_s is not None and ttft_s <= self.ttft_s and (tpot_s or 0.0) <= self.itl_s


@dataclass(frozen=True, slots=True)
class Summary:
    """What a number of requests came to. Rates are by the seconds from the first that was due to the last end, or by
    those of the window."""

    num: int
    num_ok: int
    span_s: float
    num_tokens: int
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    late: Spread
    good_per_s: float
    num_returns: int
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def error_share(self) -> float:
        return sum(self.errors.values()) / self.num if self.num else 0.0

    @property
    def offered_per_s(self) -> float:
        return self.num / self.span_s if self.span_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.span_s if self.span_s else 0.0


def summary(records: Sequence[Record], slo: Slo | None = None) -> Summary:
    """Of a whole run."""
    ends_s = [record.sent_s + (record.e2e_s or record.ttft_s or 0.0) for record in records]
    span_s = max(ends_s) - min(record.due_s for record in records) if records else 0.0
    return _summary(records, slo or Slo(), span_s, sum(record.num_output for record in records))


def levels(records: Sequence[Record], num: int, run_s: float, slo: Slo) -> list[Summary]:
    """A run cut into `num` equal parts: the stairs of a ramp. Requests belong to the part in which they were due,
    tokens to the part in which they came."""
    began_s, length_s = min((record.due_s for record in records), default=0.0), run_s / num
    came_s, parts = _came_s(records), [list[Record]() for _ in range(num)]
    for record in records:
        parts[min(num - 1, int((record.due_s - began_s) / length_s))].append(record)
    edges = [began_s + i * length_s for i in range(num + 1)]
    nums_tokens, _ = np.histogram(came_s, edges)
    return [_summary(part, slo, length_s, int(told)) for part, told in zip(parts, nums_tokens, strict=True)]


def warmed_up(records: Sequence[Record], warm_up_s: float, run_s: float, slo: Slo) -> Summary:
    """A run without its first seconds."""
    begins_s = min(record.due_s for record in records) + warm_up_s
    num_tokens = np.histogram(_came_s(records), [begins_s, begins_s + run_s - warm_up_s])[0][0]
    return _summary([r for r in records if r.due_s >= begins_s], slo, run_s - warm_up_s, int(num_tokens))


def _came_s(records: Sequence[Record]) -> FloatArray:
    """The time of day of each token; what came after a return counts as its end."""
    times = [np.empty(0)]
    for record in records:
        if record.ttft_s is not None:
            timed = record.sent_s + np.cumsum([record.ttft_s, *record.gaps_s])
            num_rest = max(0, record.num_output - len(timed))
            times += [timed, np.full(num_rest, record.sent_s + (record.e2e_s or record.ttft_s))]
    return np.concatenate(times)


def _summary(records: Sequence[Record], slo: Slo, span_s: float, num_tokens: int) -> Summary:
    return Summary(
        num=len(records),
        num_ok=sum(record.outcome == OK for record in records),
        span_s=span_s,
        num_tokens=num_tokens,
        ttft=Spread.of(record.felt_ttft_s for record in records if record.felt_ttft_s is not None),
        itl=Spread.of(gap_s for record in records for gap_s in record.gaps_s),
        tpot=Spread.of(record.tpot_s for record in records if record.tpot_s is not None),
        e2e=Spread.of(record.e2e_s for record in records if record.e2e_s is not None and not record.num_returns),
        late=Spread.of(record.late_s for record in records),
        good_per_s=sum(map(slo.is_good, records)) / span_s if span_s else 0.0,
        num_returns=sum(record.num_returns for record in records),
        errors=dict(Counter(record.outcome for record in records if record.is_error)),
    )
