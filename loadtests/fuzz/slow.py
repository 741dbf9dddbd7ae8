"""Sockets that are held open and say next to nothing: with no header, with half a header, with half a body, and with an
answer that nobody reads. `python -m loadtests.fuzz.slow` keeps so many until its standard input ends.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
from collections import Counter
from itertools import cycle

DRIP_S = 1.0
POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\nContent-Type: application/json\r\n"
ENDLESS = b'{"prompt": "a", "max_tokens": 400, "stream": true}'


async def hold(port: int, kind: str, key: bytes, tally: Counter[str]) -> None:
    """One socket after the other."""
    begun = {
        "silent": b"",
        "half a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\na: ",
        "half a body": POST % key + b"Content-Length: 100000\r\n\r\n",
        "half a body, no key": POST % b"none" + b"Content-Length: 100000\r\n\r\n",
        "unread": POST % key + b"Content-Length: %d\r\n\r\n%b" % (len(ENDLESS), ENDLESS),
    }[kind]
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        except OSError:
            tally["refused"] += 1
            await asyncio.sleep(DRIP_S)
            continue
        tally[kind] += 1
        try:
            writer.write(begun)
            while not writer.is_closing() and not (kind != "unread" and reader.at_eof()):
                await asyncio.sleep(DRIP_S)
                if kind.startswith("half"):
                    writer.write(b"x")
                    await writer.drain()
        except ConnectionError:
            tally["cut"] += 1
        finally:
            writer.transport.abort()


async def attack(port: int, key: str, num_sockets: int) -> Counter[str]:
    """Until standard input ends."""
    tally: Counter[str] = Counter()
    kinds = cycle(["silent", "half a header", "half a header", "half a body", "half a body, no key"])
    tasks = [asyncio.create_task(hold(port, next(kinds), key.encode(), tally)) for _ in range(num_sockets - 20)]
    tasks += [asyncio.create_task(hold(port, "unread", key.encode(), tally)) for _ in range(20)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return tally


def main() -> None:
    """Prints how many sockets of each kind there were."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sockets", type=int, required=True)
    parser.add_argument("--key", required=True)
    args = parser.parse_args()
    os.nice(19)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(args.sockets + 200, hard), hard))
    json.dump(asyncio.run(attack(args.port, args.key, args.sockets)), sys.stdout)


if __name__ == "__main__":
    main()
