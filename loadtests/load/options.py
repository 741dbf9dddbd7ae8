"""The command line of the Locust users, beside Locust's own.

It knows argparse only; what an option does is told by who reads it. Values are such as a master can send to workers, so
a path is text here.
"""

import argparse

from loadtests.load.schedule import SHAPES

DIALECTS = ("millrace", "openai")


def span(text: str) -> tuple[int, int]:
    """`16:96`, or one number for both. Raises `ArgumentTypeError`."""
    low, _, high = text.partition(":")
    try:
        told = int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected LOW:HIGH or one number") from None
    if not 1 <= told[0] <= told[1]:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 <= LOW <= HIGH")
    return told


def share(text: str) -> float:
    """A number from 0 to 1. Raises `ArgumentTypeError`."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return float(text)


def add(parser: argparse.ArgumentParser) -> None:
    """Give Locust's parser what these users understand."""
    group = parser.add_argument_group("streams")
    option = group.add_argument
    option(
        "--dialect", choices=DIALECTS, default="millrace", help="openai: any compatible server, standard fields only"
    )
    option("--served-model", default="", help="its name; default: the first that /v1/models tells")
    option("--api-key", default="", help="sent as a bearer token")
    option("--ignore-eos", action="store_true", help="in the openai dialect: ask for exact lengths (vLLM's field)")
    option("--prompt-tokens", type=span, default="16:96", metavar="LOW:HIGH", help="of each prompt (16:96)")
    option("--output-tokens", type=span, default="16:128", metavar="LOW:HIGH", help="of each answer (16:128)")
    option("--turns", type=span, default="2:4", metavar="LOW:HIGH", help="of a conversation (2:4)")
    option("--think-s", type=float, default=1.0, help="mean seconds between an answer and the next request (1)")
    option("--leave", type=share, default=0.0, metavar="SHARE", help="of streams that are left in the middle")
    option("--come-back", type=share, default=0.0, metavar="SHARE", help="of streams that break and are resumed")
    option("--rate", type=float, help="open loop: so many requests a second, as a Poisson process")
    option(
        "--trace",
        metavar="FILE",
        default="",
        help="open loop: arrivals and lengths of a trace, Azure's (.csv) or Mooncake's",
    )
    option("--speed", type=float, default=1.0, help="of a trace; 2 is twice as fast")
    option("--scale", type=int, default=1, help="lengths of a trace are divided by this")
    option("--longest", type=int, help="prompt and answer together, in tokens; default: what /v1/models tells")
    option("--shape", choices=SHAPES, default="flat", help="of the users or the rate over the run time")
    option("--steps", type=int, default=5, help="stairs of a ramp")
    option("--draw", type=int, default=1, metavar="SEED", help="for arrivals, lengths and prompts")
    option("--slo", default="", help="as ttft:1000,itl:100,errors:0.01 (ms, ms, share); broken, the exit code is 1")
    option(
        "--records",
        metavar="FILE",
        default="",
        help="a file for what was measured of every request, a line of JSON each",
    )
