"""A redis-server for unit tests, its functions called one by one, and a picture of all that is stored.

The protocol's clock stands still here but for what a test adds to it. Without a redis-server the tests are skipped;
where REQUIRE_REDIS=1 says that there is one, as in CI, they fail.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from service.broker.redis import PREFIX, PROTOCOL, source
from tests.faults.redis_server import RedisServer, missing

START_MS, LEASE_MS = 1_000_000, 3_000
FOR_EVER = ("clock", "workers", "due", "orphan", "dead", "rdy", "wait")  # keys that need no expiry
# Redis's clock seems to have stepped far back since the last call: the protocol's own then stands still.
FREEZE = f"#!lua flags=allow-oom\nredis.call('HSET', '{PREFIX}clock', 'wall', '9007199254740991')"
PICTURE = """#!lua flags=no-writes
local picture, read = {}, {
  hash = function(key) return redis.call('HGETALL', key) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  picture[#picture + 1] = {key, redis.call('PTTL', key), kind, read[kind](key)}
end
return cmsgpack.pack(picture)"""

# As a replica has it that did not get the last entries: of ARGV[1] it knows the first ARGV[2].
TRUNCATE = """#!lua flags=allow-oom
local call, log, request = redis.call, KEYS[1] .. 'o:' .. ARGV[1], KEYS[1] .. 'r:' .. ARGV[1]
local entries, n = call('XRANGE', log, '-', '+', 'COUNT', math.max(1, ARGV[2])), '0'
call('DEL', log)
for i = 1, math.min(#entries, ARGV[2]) do
  call('XADD', log, entries[i][1], unpack(entries[i][2]))
  n = string.match(entries[i][1], '%d+')
end
if n ~= '0' then call('PEXPIRE', log, call('PTTL', request)) end
call('HSET', request, 'n', n)"""
# As a replica has it that never heard of ARGV[1].
LOSE = """#!lua flags=allow-oom
local call, K, id = redis.call, KEYS[1], ARGV[1]
local st, q, size, tn, cl, wk, idem = unpack(
  call('HMGET', K .. 'r:' .. id, 'st', 'q', 'size', 'tn', 'cl', 'wk', 'idem'))
call('DEL', K .. 'r:' .. id, K .. 'o:' .. id, idem or K .. 'none')
for _, key in ipairs({'rdy:' .. q .. ':' .. cl, 'wait:' .. q, 'due', 'orphan'}) do call('ZREM', K .. key, id) end
call('SREM', K .. 'held:' .. wk, id)
if st ~= 'e' then call('HINCRBY', K .. 't:' .. tn, 'open', -1) end
if st == 'w' then call('HINCRBY', K .. 'q:' .. q, 'tokens', -size) end
if st == 'r' then call('HINCRBY', K .. 'q:' .. q, 'running', -1) end"""


def need_redis() -> None:
    """Skips the test, or fails it, with the reason why there is no redis-server."""
    why = missing()
    if why and os.environ.get("REQUIRE_REDIS") == "1":
        pytest.fail(why)
    if why:
        pytest.skip(f"NOT TESTED, for {why}")


@contextmanager
def redis_server(folder: Path, **options: Any) -> Iterator[RedisServer]:
    """A running one, or the reason why there is none."""
    need_redis()
    with RedisServer(folder, **options) as server:
        yield server


def entry(start: int, ids: Sequence[int], reason: str = "") -> bytes:
    """A log's entry, as a worker writes it."""
    packed: bytes = msgpack.packb([1, start, ids, [], [reason, None, None] if reason else None])
    return packed


class Functions:
    """The functions of the queue, each called by itself."""

    def __init__(self, server: RedisServer) -> None:
        self.server, self.cli = server, server.cli()
        self._freeze = self.cli.script_load(FREEZE)
        self.reset()

    def reset(self) -> None:
        """An empty Redis."""
        self.server.empty()
        self.cli.flushall()
        self.cli.function_load(source(), replace=True)
        self.set_clock(START_MS)

    def set_clock(self, ms: int) -> None:
        """Time has passed, and nothing happens by itself."""
        self.cli.eval(f"#!lua flags=allow-oom\nredis.call('HSET', '{PREFIX}clock', 'ms', ARGV[1])", 0, ms)
        self.now_ms = ms

    def pass_ms(self, ms: int) -> None:
        self.set_clock(self.now_ms + ms)

    def truncate(self, id: str, num_entries: int) -> None:
        """The end of its log is lost."""
        self.cli.eval(TRUNCATE, 1, PREFIX, id, num_entries)

    def lose(self, id: str) -> None:
        """All of it is lost."""
        self.cli.eval(LOSE, 1, PREFIX, id)

    def call(self, name: str, *args: Any) -> Any:
        """Raises what Redis refuses it with."""
        pipeline: Any = self.cli.pipeline(transaction=False)
        pipeline.execute_command("EVALSHA", self._freeze, 0)
        pipeline.execute_command("FCALL", f"millrace{PROTOCOL}_{name}", 1, PREFIX + "clock", *args)
        frozen, reply = pipeline.execute(raise_on_error=False)
        for answer in (frozen, reply):
            if isinstance(answer, Exception):
                raise answer
        return reply

    # --- in the terms of a test --------------------------------------------------------------------------------------

    def submit(self, *ids: str, queue: str = "q", tenant: str = "x", left_ms: int | str = "", orphan: str = "") -> Any:
        """Requests of 3 prompt tokens and 4 more, as a group each."""
        for id in ids:
            asked = (id, b"payload", 3, 7, left_ms, "", orphan, 1)
            reply = self.call("submit", queue, 100, 10_000, tenant, "b", 1.0, 20_000, "", "", id, *asked)
        return reply

    def claim(self, worker: str, token: str, room: int = 99, queue: str = "q") -> list[str]:
        """Ids, in order."""
        return [job[0].decode() for job in self.call("claim", worker, queue, token, room, LEASE_MS)]

    def commit(self, worker: str, number: int, *step: tuple[str, str, int, Sequence[int], str]) -> list[int]:
        """Of each: id, token, start, ids, reason of the end or ''."""
        deltas = [
            (id, token, start, len(ids), entry(start, ids, why), bool(why)) for id, token, start, ids, why in step
        ]
        packed = msgpack.packb(deltas, use_bin_type=False)
        codes: list[int] = self.call("commit", worker, LEASE_MS, number, packed)
        return codes

    def field(self, id: str, name: str) -> str | None:
        """Of a request."""
        value: Any = self.cli.hget(f"{PREFIX}r:{id}", name)
        return None if value is None else str(value, "utf-8")

    def log(self, id: str) -> list[int]:
        """The ids that are stored."""
        found: Any = self.cli.xrange(f"{PREFIX}o:{id}")
        return [token_id for _, fields in found for token_id in msgpack.unpackb(fields[b"e"])[2]]

    def end(self, id: str) -> list[Any] | None:
        """Reason, stop and error of the terminal entry."""
        found: Any = self.cli.xrevrange(f"{PREFIX}o:{id}", count=1)
        ((_, fields),) = found or [(None, {b"e": entry(0, ())})]
        finish: list[Any] | None = msgpack.unpackb(fields[b"e"])[4]
        return finish

    def picture(self) -> "Picture":
        """All that is stored."""
        packed: bytes = self.cli.eval(PICTURE, 0)
        return Picture(packed)


class Picture:
    """Everything in Redis at one moment, by the names of `service/broker/redis.py` without their prefix."""

    def __init__(self, packed: bytes) -> None:
        self.hashes: dict[str, dict[str, str]] = {}
        self.sets: dict[str, set[str]] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.streams: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.ttl_ms: dict[str, int] = {}
        for raw, ttl_ms, kind, content in msgpack.unpackb(packed, raw=True):
            name = raw.decode().removeprefix(PREFIX)
            self.ttl_ms[name] = ttl_ms
            if kind == b"hash":
                self.hashes[name] = {k.decode(): v.decode("latin-1") for k, v in _pairs(content)}
            elif kind == b"set":
                self.sets[name] = {member.decode() for member in content}
            elif kind == b"zset":
                self.scores[name] = {member.decode(): float(score) for member, score in _pairs(content)}
            else:
                self.streams[name] = [(id.decode(), {k.decode(): v for k, v in _pairs(f)}) for id, f in content]

    def ids(self) -> list[str]:
        """Every request that is known."""
        return sorted(name.removeprefix("r:") for name in self.hashes if name.startswith("r:"))

    def kept_for_ever(self) -> list[str]:
        """Keys that have no expiry and should have one."""
        return [name for name, ttl_ms in self.ttl_ms.items() if ttl_ms < 0 and name.partition(":")[0] not in FOR_EVER]


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)
