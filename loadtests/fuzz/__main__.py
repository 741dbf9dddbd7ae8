"""`make fuzz`: a server with keys under attack from requests made of its own description, from spoilt HTTP, and from
thousands of sockets that say nothing, while a polite client goes on asking.

Prints the answers of 500 and more, the ends of the process, the hangs, and the polite client's 99th percentiles before
and meanwhile; exits with 1 if there were any, or if a percentile more than doubled. The attackers run at the lowest
priority: they share the machine, and what is measured is the server.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from service.keys import add_key
from tests.model.conftest import TINY, random_decoder, save_folder
from tests.test_serve import Served, serving

HANG_S = 1.0
CUT = 0  # a polite client's request that got no answer


def role(name: str, server: Served, key: str, **options: int) -> "subprocess.Popen[str]":
    """A process that attacks, or is polite."""
    flags = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    command = [sys.executable, "-W", "ignore", "-m", f"loadtests.fuzz.{name}", "--port", str(server.port), "--key", key]
    return subprocess.Popen([*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]") -> Any:
    """Tell it to stop, if it goes on until then; what it has found."""
    told, _ = process.communicate()
    return json.loads(told)


def polite(server: Served, key: str, for_s: float) -> dict[str, list[tuple[float, int]]]:
    """Alone."""
    process = role("polite", server, key)
    time.sleep(for_s)
    told: dict[str, list[tuple[float, int]]] = end(process)
    return told


def p99_ms(times: list[tuple[float, int]]) -> float:
    """The 99th percentile."""
    return 1000 * statistics.quantiles([seconds for seconds, _ in times], n=100)[98]


def run(args: argparse.Namespace, folder: Path) -> bool:
    """The whole evening. True if nothing happened."""
    keys = folder / "keys.json"
    good, bad = add_key(keys, "polite"), add_key(keys, "attacker")
    model = save_folder(random_decoder(TINY), folder / "model")
    flags = ("--api-keys-file", str(keys), "--max-request-s", "5")
    with open(folder / "log", "wb") as log, serving(model, *flags, log=log.fileno()) as server:
        process = psutil.Process(server.process.pid)
        before, rss = polite(server, good, args.quiet_s), process.memory_info().rss
        begun_s = time.monotonic()
        patient, slow = role("polite", server, good), role("slow", server, bad, sockets=args.sockets)
        attackers = [
            role("schema", server, bad, cases=args.cases // args.processes, seed=args.seed + 10**6 * number)
            for number in range(args.processes)
        ]
        raw = role("raw", server, bad, cases=args.raw, seed=args.seed)
        cases, spoilt = [end(each) for each in attackers], end(raw)
        held, meanwhile = end(slow), end(patient)
        ended = int(server.process.poll() is not None)
        grown = 0 if ended else process.memory_info().rss - rss
    return report(cases, spoilt, held, before, meanwhile, ended, grown, time.monotonic() - begun_s)


def report(
    cases: list[Any], spoilt: Any, held: Any, before: Any, meanwhile: Any, ended: int, grown: int, took_s: float
) -> bool:
    """Print it all. True if nothing happened."""
    statuses: Counter[str] = Counter()
    for each in cases:
        statuses.update(each["statuses"])
    complaints = [line for each in [*cases, spoilt] for line in each["complaints"]]
    waited = [seconds for times in (before, meanwhile) for seconds, _ in times["/health"]]
    hangs = sum(seconds > HANG_S for seconds in waited) + spoilt["outcomes"].get("hang", 0)
    cut = sum(status != 200 for times in meanwhile.values() for _, status in times)
    print(f"{sum(statuses.values())} cases from /openapi.json: {dict(sorted(statuses.items()))}")
    print(f"{sum(spoilt['outcomes'].values())} spoilt: {spoilt['outcomes']}, the longest {spoilt['longest_s']} s")
    print(f"held open: {held}")
    print(f"in {took_s:.0f} s, memory grew by {grown / 2**20:.0f} MiB")
    for line in complaints[:20]:
        print(f"  {line}")
    slower = 0.0
    for path in before:
        alone, among = p99_ms(before[path]), p99_ms(meanwhile[path])
        slower = max(slower, among / alone)
        told = f"{len(before[path])} and {len(meanwhile[path])} requests"
        print(f"polite {path}: p99 {alone:.0f} ms before, {among:.0f} ms meanwhile, of {told}")
    print(
        f"responses >= 500 or telling: {len(complaints)}   process exits: {ended}   hangs over {HANG_S:.0f} s: {hangs}"
    )
    print(f"polite requests that failed: {cut}   p99 {slower:.2f} times")
    return not (complaints or ended or hangs or cut) and slower <= 2


def main() -> None:
    """Exits with 1 if anything happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=50_000, help="requests made from /openapi.json")
    parser.add_argument("--raw", type=int, default=50_000, help="spoilt requests")
    parser.add_argument("--sockets", type=int, default=2000, help="held open")
    parser.add_argument("--processes", type=int, default=2, help="that make requests from /openapi.json")
    parser.add_argument("--quiet-s", type=float, default=20.0, help="to measure before")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if run(args, Path(folder)) else 1)


if __name__ == "__main__":
    main()
