"""From records to figures: percentiles, goodput, whether a promise was kept, and where the knee is.

Definitions, since benchmarks differ. TTFT: from when a request was due (open loop) or sent (closed) to its first token.
Inter-token: each gap between two tokens of a stream. TPOT: the mean gap of one stream, as in vLLM's benchmark, which
leaves out the first token. Throughput: tokens that came, by the time from the first sending to the last end. Goodput:
requests a second whose own TTFT and TPOT are within the SLO. A stream that was left on purpose is no error.
It reads no files and draws nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loadtests.load.records import OK, Record

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


def summary(records: Sequence[Record], slo: Slo | None = None, window_s: float | None = None) -> Summary:
    """Of these requests. With `window_s` they are those of a window of that length, and rates are by it."""
    slo = slo or Slo()
    ends_s = [record.sent_s + (record.e2e_s or record.ttft_s or 0.0) for record in records]
    span_s = window_s or (max(ends_s) - min(record.due_s for record in records) if records else 0.0)
    return Summary(
        num=len(records),
        num_ok=sum(record.outcome == OK for record in records),
        span_s=span_s,
        num_tokens=sum(record.num_output for record in records),
        ttft=Spread.of(record.felt_ttft_s for record in records if record.felt_ttft_s is not None),
        itl=Spread.of(gap_s for record in records for gap_s in record.gaps_s),
        tpot=Spread.of(record.tpot_s for record in records if record.tpot_s is not None),
        e2e=Spread.of(record.e2e_s for record in records if record.e2e_s is not None and not record.num_returns),
        late=Spread.of(record.late_s for record in records),
        good_per_s=sum(map(slo.is_good, records)) / span_s if span_s else 0.0,
        num_returns=sum(record.num_returns for record in records),
        errors=dict(Counter(record.outcome for record in records if record.is_error)),
    )


def levels(records: Sequence[Record], num: int, run_s: float, slo: Slo) -> list[Summary]:
    """A run cut into `num` equal parts by when requests were due: the stairs of a ramp."""
    began_s = min((record.due_s for record in records), default=0.0)
    parts: list[list[Record]] = [[] for _ in range(num)]
    for record in records:
        parts[min(num - 1, int((record.due_s - began_s) / run_s * num))].append(record)
    return [summary(part, slo, run_s / num) for part in parts]
