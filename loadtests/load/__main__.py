"""`make loadtest` and `make loadtest-sweep`: start the stack, load it, write a report, exit by the SLO.

    python -m loadtests.load run [options] [-- Locust's and the users' options]
    python -m loadtests.load sweep [options] [-- ...]

`run` is an open loop that rises in stairs to `--rate`: the three kinds of visits, some left in the middle, some broken
and resumed; or what the options after `--` say, `--trace` for one. The exit code is 1 where its SLO is broken. `sweep`
raises the rate until the SLO breaks, halves the gap between the last kept and the first broken one a few times, and
states the capacity: the highest rate up to which the SLO was kept. It exits with 1 where not even the first one keeps
it.
"""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from loadtests.clients.__main__ import BUNDLED
from loadtests.load import outside, report
from loadtests.load.drive import locust
from loadtests.load.figures import LATE_S, Slo, Summary, levels, summary, warmed_up
from loadtests.load.records import LEFT, Record
from loadtests.load.report import Run
from loadtests.load.scrape import ITL, TTFT, Agreement, Watch, agreements
from loadtests.load.stack import Stack, started

KINDS = ("Generate", "Chat", "Conversation")
MIXED = ("--leave", "0.03", "--come-back", "0.05")
LENGTHS = ("--prompt-tokens", "64:512", "--output-tokens", "16:128")  # where `longest` is at least a thousand
WARM_UP = 0.15  # of a level of a sweep, left out


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    args, passed = _parsed(sys.argv[1:] if argv is None else argv)
    args.out.mkdir(parents=True, exist_ok=True)
    slo = Slo.parse(args.slo)
    with serving(args) as stack:
        made = (run if args.what == "run" else sweep)(stack, args, passed, slo)
    path = report.write(made, args.out)
    (args.out / "report.json").write_text(json.dumps(as_json(made), indent=1))
    print(told(made))
    print(f"report: {path}")
    return int(bool(slo.broken(made.total)))


@contextmanager
def serving(args: argparse.Namespace) -> Iterator[Stack]:
    """The stack that was asked for, or one that runs already."""
    if args.url:
        yield Stack(args.url.rstrip("/"), (args.metrics_url or args.url.rstrip("/"),), args.url, ())
        return
    with started(args.out, shlex.split(args.serve), args.workers) as stack:
        yield stack


def run(stack: Stack, args: argparse.Namespace, passed: Sequence[str], slo: Slo) -> Run:
    """One scenario."""
    flags = list(passed)
    if not {"--trace", "--prompt-tokens", "--output-tokens"} & set(flags):
        flags += LENGTHS
    if not {"--trace", "--rate", "-u"} & set(flags):
        flags = [*flags, "--rate", str(args.rate), "--shape", "ramp", "--steps", str(args.levels)]
    if not any(kind in flags for kind in KINDS):
        flags = [*(("Generate",) if "--trace" in flags else KINDS), *flags]
    if "--leave" not in flags and "--come-back" not in flags:
        flags += MIXED
    with Watch(stack.metrics_urls) as watch:
        records = locust(stack.url, args.out, args.seconds, flags)
    seen = compared(watch, records) if _is_millrace(watch) else []
    others: list[Agreement] = []
    if args.guidellm:
        path = outside.program() if args.guidellm == "install" else Path(args.guidellm)
        others = outside.compared(stack, args.out, args.seconds / 4, path, _folder(args))
    parts = levels(records, args.levels, _length_s(records, args.seconds), slo)
    total = summary(records, slo)
    command = shlex.join(["python", "-m", "loadtests.load", *sys.argv[1:]])
    return Run("Load test", command, _described(stack), slo, total, parts, records, watch.glances, seen, others)


def sweep(stack: Stack, args: argparse.Namespace, passed: Sequence[str], slo: Slo) -> Run:
    """From rate to rate, and where the knee is."""
    flags = list(passed) if any(kind in passed for kind in KINDS) else ["Generate", *passed]
    if not {"--prompt-tokens", "--output-tokens"} & set(flags):
        flags += LENGTHS
    ran: dict[float, tuple[Summary, list[Record], Watch]] = {}

    def keeps(rate: float) -> bool:
        with Watch(stack.metrics_urls) as watch:
            records = locust(stack.url, args.out, args.seconds, [*flags, "--rate", f"{rate:g}"])
        ran[rate] = warmed_up(records, WARM_UP * args.seconds, args.seconds, slo), records, watch
        broken = slo.broken(ran[rate][0])
        print(f"{_line(rate, ran[rate][0])}   {'; '.join(broken) or 'kept'}", flush=True)
        return not broken

    capacity = knee(keeps, args.rate, args.halvings)
    shown = ran[capacity or min(ran)]
    verdict = (
        f"capacity: {capacity:g} requests/s, {ran[capacity][0].tokens_per_s:,.0f} tokens/s" if capacity else "none"
    )
    return Run(
        "Capacity", shlex.join(["python", "-m", "loadtests.load", *sys.argv[1:]]), _described(stack), slo, shown[0],
        [ran[rate][0] for rate in sorted(ran)], shown[1], shown[2].glances,
        compared(shown[2], shown[1]) if _is_millrace(shown[2]) else [], (), verdict,
    )  # fmt: skip


def knee(keeps: Callable[[float], bool], first: float, halvings: int, most: int = 12) -> float | None:
    """The highest rate that was kept, with none below it broken: half as much again each time until one breaks, then
    the middle between the two, `halvings` times. None if the first one breaks."""
    kept, rate = None, first
    for _ in range(most):
        if not keeps(rate):
            break
        kept, rate = rate, rate * 1.5
    else:
        return kept
    if kept is None:
        return None
    for _ in range(halvings):
        middle = (kept + rate) / 2
        kept, rate = (middle, rate) if keeps(middle) else (kept, middle)
    return kept


def compared(watch: Watch, records: Sequence[Record]) -> list[Agreement]:
    """What this client timed, beside the same in the server's histograms: from sending, not from being due."""
    ttfts = [record.ttft_s for record in records if record.ttft_s is not None]
    gaps = [gap_s for record in records for gap_s in record.gaps_s]
    values: dict[str, Sequence[float]] = {TTFT: ttfts, ITL: gaps}
    if not any(record.outcome == LEFT or record.num_returns for record in records):
        values["millrace_request_seconds"] = [record.e2e_s for record in records if record.e2e_s is not None]
    return agreements(watch, values)


def as_json(made: Run) -> dict[str, object]:
    """What a report tells, for a program."""
    return {
        "command": made.command,
        "slo": asdict(made.slo),
        "broken": made.slo.broken(made.total),
        "verdict": made.verdict,
        "total": asdict(made.total),
        "levels": [asdict(level) for level in made.levels],
        "server": [asdict(row) | {"difference": row.difference} for row in made.server],
        "outside": [asdict(row) | {"difference": row.difference} for row in made.outside],
    }


def told(made: Run) -> str:
    """For a terminal."""
    total, lines = made.total, [_line(made.total.offered_per_s, made.total)]
    for kind, num in total.errors.items():
        lines.append(f"  {num} x {kind}")
    if total.late.quantiles[0.99] > LATE_S:
        lines.append(f"  the client was late (p99 {total.late.quantiles[0.99] * 1e3:.0f} ms): give it more processes")
    for row in (*made.server, *made.outside):
        scale = 1e3 if row.unit == "ms" else 1
        lines.append(f"  {row.what:32s} {row.ours * scale:10.2f} {row.theirs * scale:10.2f} {row.difference:+7.1%}")
    return "\n".join([*lines, *(f"SLO broken: {line}" for line in made.slo.broken(total)), made.verdict]).rstrip()


def _line(rate: float, level: Summary) -> str:
    ttft, itl = level.ttft.quantiles, level.itl.quantiles
    return (
        f"{rate:6.2f} requests/s  {level.tokens_per_s:7.0f} tokens/s  TTFT p50 {ttft[0.5] * 1e3:6.1f} p99 "
        f"{ttft[0.99] * 1e3:7.1f} ms  inter-token p50 {itl[0.5] * 1e3:5.1f} p99 {itl[0.99] * 1e3:6.1f} ms  "
        f"good {level.good_per_s:6.2f}/s  errors {level.error_share:.1%}"
    )


def _folder(args: argparse.Namespace) -> Path:
    """Of the served model, which has its tokenizer."""
    flags = shlex.split(args.serve)
    return Path(flags[flags.index("--model") + 1]).resolve() if "--model" in flags else BUNDLED


def _is_millrace(watch: Watch) -> bool:
    return f"{TTFT}_sum" in watch.after


def _length_s(records: Sequence[Record], run_s: float) -> float:
    """Of the time in which requests were due."""
    return min(run_s, max(1.0, max(record.due_s for record in records) - min(record.due_s for record in records)))


def _described(stack: Stack) -> str:
    return f"{stack.described}; {platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"


def _parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, passed = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, ())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "sweep"])
    option = parser.add_argument
    option("--url", help="a server that runs already; else one is started")
    option("--metrics-url", help="where it tells its metrics, if that is elsewhere")
    option("--serve", default="", help="flags for `millrace serve`, or for the workers, in one text")
    option("--workers", type=int, default=0, help="so many, with an api, over a Redis of their own; 0 is embedded")
    option("--seconds", type=float, default=60.0, help="of the run, or of each level of a sweep")
    option("--rate", type=float, default=8.0, help="requests/s at the top of the stairs, or where a sweep begins")
    option("--levels", type=int, default=5, help="stairs of a run")
    option("--halvings", type=int, default=3, help="of the gap at the knee")
    option("--slo", default="ttft:1000,itl:100,errors:0.01", help="p99 in ms, and the share of errors")
    option("--guidellm", default="", metavar="PATH", help="compare with it; `install` does what `make clients` does")
    option("--out", type=Path, default=Path("build/loadtest"), help="a folder for the report")
    return parser.parse_args(own), list(passed)


if __name__ == "__main__":
    sys.exit(main())
