"""What was measured, as text for a terminal and as JSON."""

import statistics
import sys

from loadtests.peers.bars import Point, Turn, Verdict, doubts, gap_s, ttft_s, verdicts

MARKS = {True: "met", False: "MISSED", None: "NOT PROVED"}


def row(point: Point, name: str, rss_bytes: int) -> dict[str, object]:
    """The medians of one contender."""

    def median(figure: float) -> float:
        return round(figure, 4)

    turns = point.turns[name]
    served = bool(turns[0].full.ttfts_s)
    return {
        "size": point.size,
        "dtype": point.dtype,
        "streams": point.num_streams,
        "contender": name,
        "output_tokens_per_s": median(point.median(name, point.output_rate)),
        "decode_tokens_per_s": median(point.median(name, point.decode_rate)),
        "prefill_tokens_per_s": median(point.median(name, point.prefill_rate)),
        "ttft_p50_ms": median(1e3 * point.median(name, ttft_s)) if served else None,
        "inter_token_p99_ms": median(1e3 * point.median(name, gap_s)) if served else None,
        "num_together": min(map(num_together, turns)) if served else None,
        "cores": median(statistics.median(turn.full.cores for turn in turns)),
        "foreign_cores": median(statistics.median(turn.full.foreign for turn in turns)),
        "rss_bytes": rss_bytes,
    }


def num_together(turn: Turn) -> int:
    """How many streams had begun before the first one ended, from their first tokens' and gaps' times: as many as
    there are, if all of them are computed in one batch."""
    run = turn.full
    per_stream = len(run.gaps_s) // len(run.ttfts_s)
    spans = [run.gaps_s[i * per_stream : (i + 1) * per_stream] for i in range(len(run.ttfts_s))]
    first_end_s = min(ttft + sum(gaps) for ttft, gaps in zip(run.ttfts_s, spans, strict=True))
    return sum(ttft <= first_end_s for ttft in run.ttfts_s)


def show(point: Point, rows: list[dict[str, object]], num_threads: int) -> None:
    """Print a point: a line for each contender, then its promises, then what makes it hard to believe."""
    print(f"\n{point.size} {point.dtype}, {point.num_streams} streams, {point.num_prompt} + {point.num_new} tokens")
    heads = ("output/s", "decode/s", "prefill/s", "TTFT p50", "token p99", "together", "cores", "others", "RSS MiB")
    print(f"  {'':18s}" + "".join(f"{head:>10s}" for head in heads))
    for each in rows:
        cells = [f"{each[f'{what}_tokens_per_s']:10.1f}" for what in ("output", "decode", "prefill")]
        for what in ("ttft_p50_ms", "inter_token_p99_ms"):
            cells.append(f"{'':10s}" if each[what] is None else f"{each[what]:7.1f} ms")
        cells.append(f"{'':10s}" if each["num_together"] is None else f"{each['num_together']:10d}")
        assert isinstance(each["rss_bytes"], int)
        cells += [f"{each['cores']:10.2f}", f"{each['foreign_cores']:10.2f}", f"{each['rss_bytes'] / 2**20:10.0f}"]
        print(f"  {each['contender']!s:18s}" + "".join(cells))
    if point.sweeps:
        best, sweeps = max(point.sweeps), ", ".join(f"{sweep / 1e9:.1f}" for sweep in point.sweeps)
        print(f"  memory is read at {best / 1e9:.1f} GB/s (sweeps: {sweeps}); a token takes at least")
        print(f"  {point.step_bytes / 1e6:.0f} MB of it: at most {best / point.step_bytes:.1f} tokens/s")
    for verdict in verdicts(point):
        print("  " + line(verdict))
    for doubt in doubts(point, num_threads):
        print(f"  !! {doubt}")
    sys.stdout.flush()


def line(verdict: Verdict) -> str:
    """A promise, its figure, and whether it is kept."""
    sign, mark = "<=" if verdict.at_most else ">=", MARKS[verdict.is_met]
    value = f"{verdict.value:6.2f}" if verdict.value is not None else f"{'-':>6s}"
    reason = f" ({verdict.why})" if verdict.value is None else ""
    return f"{mark:10s} {verdict.what:44s} {value}  bar {sign} {verdict.bar:.2f}{reason}"


def is_proved(points: list[Point], num_threads: int) -> bool:
    """Whether every promise was measured without a doubt and is met."""
    is_met = all(verdict.is_met for point in points for verdict in verdicts(point))
    return is_met and not any(doubts(point, num_threads) for point in points)


def summary(points: list[Point], num_threads: int) -> str:
    """All that is missed or not proved, and the counts."""
    lines = []
    counts = {True: 0, False: 0, None: 0}
    for point in points:
        for verdict in verdicts(point):
            counts[verdict.is_met] += 1
            if not verdict.is_met:
                lines.append(f"{point.size} {point.dtype} {point.num_streams:3d} streams  {line(verdict)}")
    counted = f"{counts[True]} bars met, {counts[False]} missed, {counts[None]} not proved"
    num_doubtful = sum(bool(doubts(point, num_threads)) for point in points)
    doubtful = f"!! figures of {num_doubtful} of {len(points)} points are in doubt: they prove nothing either way"
    return "\n".join([*lines, counted, *([doubtful] if num_doubtful else [])])


def as_json(point: Point, rows: list[dict[str, object]], num_threads: int) -> dict[str, object]:
    """A point for a file."""
    return {
        "size": point.size,
        "dtype": point.dtype,
        "streams": point.num_streams,
        "contenders": rows,
        "sweeps_bytes_per_s": point.sweeps,
        "step_bytes": point.step_bytes,
        "bars": [
            {"what": v.what, "value": v.value, "bar": v.bar, "at_most": v.at_most, "met": v.is_met, "why": v.why}
            for v in verdicts(point)
        ],
        "doubts": doubts(point, num_threads),
        "left_out": point.left_out,
    }
