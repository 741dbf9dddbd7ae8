"""Bytes that are nearly HTTP: good requests, spoilt. `python -m loadtests.fuzz.raw` sends them to a server, many at a
time, and prints what came back as one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter

BODY = b'{"prompt": "hi", "max_tokens": 2}'
GOOD = [
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY\r\nAccept: */*\r\n\r\n",
    b"HEAD /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"OPTIONS /generate HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: KEY\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
]
SPICE = [
    *(
        b"\0",
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b":",
        b"\xff\xfe",
        b"\xc3\x28",
        b"%00",
        b"%2e%2e/",
        b"../",
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Length: -1\r\n"),
    *(b"Content-Length: 18446744073709551616\r\n", b"Content-Length: 0x10\r\n", b"Content-Length: 5\r\n"),
    *(b"Host: a/healthz?\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"HTTP/9.9"),
    *(b"Connection: close\r\n", b"Connection: keep-alive, close\r\n", b"Content-Encoding: gzip\r\n", b" folded\r\n"),
    *(
        b"x" * 5000,
        b"a: b\r\n" * 70,
        b"ffffffffffffffff\r\n",
        b"0\r\n\r\n",
        b";ext=" + b"y" * 2000,
        b"-1\r\n",
        b"PRI * ",
    ),
    *(b'"\\ud800"', b"1e999", b"NaN", b"[" * 300, b"9" * 30, b'"prompt": 1,', b"\xe2\x80\xa8", b"{}", b"null"),
]
AT_ONCE = 500
LONGEST_S = 5.0 + 10.0 + 1.0  # a server's time for headers, for a body, and the one in which it must react
BROKEN = re.compile(rb"HTTP/1\.1 5\d\d")


def spoilt(rng: random.Random) -> bytes:
    """A request or two with something wrong, mostly."""
    text = bytearray(b"".join(rng.choices(GOOD, k=rng.choice((1, 1, 1, 2, 3)))))
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice((1, 2, 10, 60)))
        match rng.randrange(6):
            case 0:
                del text[at:end]
            case 1:
                text[at:at] = rng.choice(SPICE)
            case 2:
                text[at:end] = rng.choice(SPICE)
            case 3:
                text[at:at] = text[at:end] * rng.choice((1, 2, 50))
            case 4 if at < len(text):
                text[at] ^= 1 << rng.randrange(8)
            case _:
                del text[at:]
    return bytes(text)


async def say(port: int, text: bytes, rng: random.Random) -> bytes:
    """What comes back, sent in pieces; the connection is given up after the last answer, by either side."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while text:
            size = rng.choice((1, 7, 1000, 10**6, 10**6))
            writer.write(text[:size])
            text = text[size:]
            await asyncio.sleep(0)
        if rng.random() < 0.5:
            writer.write_eof()
        return await reader.read()
    except OSError:  # closed while we spoke
        return b""
    finally:
        writer.close()


async def attack(port: int, key: str, cases: int, seed: int, at_once: int = AT_ONCE) -> dict[str, object]:
    """All of them. A hang is a connection that the server neither answers nor closes in time."""
    rng, outcomes, complaints, room = random.Random(seed), Counter[str](), list[str](), asyncio.Semaphore(at_once)
    longest_s = 0.0

    async def one(text: bytes) -> None:
        nonlocal longest_s
        async with room:
            begun_s = time.monotonic()
            try:
                async with asyncio.timeout(4 * LONGEST_S):
                    answer = await say(port, text.replace(b"KEY", key.encode()), rng)
            except TimeoutError:
                outcomes["hang"] += 1
                complaints.append(f"hang: {text[:400]!r}")
                return
            longest_s = max(longest_s, time.monotonic() - begun_s)
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
        outcomes[statuses[-1].decode() if statuses else "closed"] += 1
        if BROKEN.search(answer):
            complaints.append(f"{text[:400]!r} -> {answer[:300]!r}")

    await asyncio.gather(*(one(spoilt(rng)) for _ in range(cases)))
    return {"outcomes": outcomes, "complaints": complaints, "longest_s": round(longest_s, 1)}


def main() -> None:
    """Prints the outcomes."""
    parser = argparse.ArgumentParser()
    for name in ("port", "cases", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--key", required=True)
    args = parser.parse_args()
    os.nice(19)
    json.dump(asyncio.run(attack(args.port, args.key, args.cases, args.seed)), sys.stdout)


if __name__ == "__main__":
    main()
