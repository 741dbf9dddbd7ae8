"""The queue in Redis: its keys, the one connection that every call of a process goes through, and the start's checks.

All keys begin with `millrace:{0}:`; the braces put them into one slot of a cluster. `<rid>` is one sequence.

| key | type | holds | goes |
|---|---|---|---|
| `clock` | hash | wall: Redis's clock at the last call; ms: the protocol's own | never |
| `r:<rid>` | hash | the request (`p`) and its state, see below | by `due`; real expiry long after |
| `o:<rid>` | stream | the log: an entry's id is `<ids so far>-1`, the terminal one's `<ids>-2` | with `r:` |
| `rdy:<queue>:a`, `:b` | sorted set | waiting, ahead and the others, by start tag of fair queueing | when empty |
| `wait:<queue>` | sorted set | waiting, by time of submission | when empty |
| `q:<queue>` | hash | tokens, running, last and interval (of ends), va and vb (virtual times), books | after 8 days |
| `t:<tenant>` | hash | open (not ended), and for each queue and class the finish tag | after 8 days |
| `held:<worker>` | set | what it is computing | with the worker |
| `w:<worker>` | hash | info, and the last claim and commit with their replies, for who asks again | with the worker |
| `workers` | sorted set | live workers, by the end of their lease | entries by `reap` |
| `due` | sorted set | every request: its deadline, once ended the time to forget it | entries by `reap` |
| `orphan` | sorted set | requests that need a reader, by the time they would be cancelled | entries by `reap` |
| `idem:<tenant>:<sha256>` | hash | id and body of an idempotency key | with its request |
| `dead` | stream | the last 1,000 requests that were given up after crashes | never |

Books are `in`, what was taken in, and `end:<reason>`, what has ended so.

`r:` has st (w, r, e: waiting, running, ended), lk (this claim's random token), wk (its worker), n (ids in the log), cx
(c or t: cancelled, out of time, while running), c and cn (what crashes in a row at one place count against it, and
where), at (claims), pc (a claim's token and how far the prompt has come under it), mb (processes that read it), q, tn,
cl, tag, size, t0, qms, ft, dl, qd, orphan, keep, idem.

Channels, which may lose messages without harm, the log being the truth: `mail:<api>` carries entries to a process that
reads, `bell:<queue>` says that something waits, `work:<worker>` that a request it computes shall end.

Who loads the functions: workers, at their start and when they are gone (`FUNCTION LOAD REPLACE`). A worker whose user
may not do that calls those of its version that it finds, brought by `millrace load-functions`, and without them refuses
to start. An API process calls them and nothing else, so what faces the network may not bring code. What each user needs
is in deploy/redis/users.acl.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.broker.codec import VERSION
from service.broker.redis_metrics import LinkMetrics
from service.errors import MillraceError, StartupError, Unavailable

PREFIX = "millrace:{0}:"
PROTOCOL = VERSION  # a change of the functions that an older program can't live with raises it, and the library's name
CONNECT_S, ANSWER_S, AGAIN_S = 0.5, 1.0, 0.05
MAX_BATCH = 128  # calls in one round trip
# How a lost connection shows. The last is uvloop's, for who writes to a transport that was reset.
LOST = (exceptions.ConnectionError, exceptions.TimeoutError, OSError, RuntimeError)
# Replies by which a server says that it can't answer now, but will: loading, failing over, its disk full.
NOT_NOW = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "NOREPLICAS", "BUSY ")
UNLOADED = "Function not found"

logger = logging.getLogger(__name__)
Handler = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker announces. Only requests of its `queue` come to it, and the queue's name follows from the rest."""

    queue: str
    door: str  # hash of configuration and tokenizer
    weights: str
    dtype: str  # and how weights are quantised, if they are: `EngineConfig.number_format`
    max_model_len: int
    protocol: int = PROTOCOL


@dataclass(slots=True, eq=False)
class _Call:
    name: str
    args: tuple[Any, ...]
    reply: "asyncio.Future[Any]"


class Link:
    """Calls of functions, in order, each retried until it is answered: every function may be asked twice.

    One task owns the command connection and sends what has gathered in one round trip; another owns the subscription.
    A caller that is cancelled therefore never breaks a connection. `may_load`: load the functions where they lack, if
    Redis allows it.
    """

    def __init__(self, url: str, may_load: bool = False) -> None:
        self._may_load = may_load
        self._client = _client(url)
        self._calls: list[_Call] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._away_since_s: float | None = None
        self._where = _where(url)
        self.metrics = LinkMetrics(self.away_s)

    async def open(self) -> None:
        """Connect. Raises `StartupError`, in one line that names the fix."""
        try:
            info = await self._client.info()
            if self._may_load:
                await self._load_or_find()
        except exceptions.RedisError as error:
            raise StartupError(_refusal(error, self._where)) from None
        _check_info(info, self._where)
        self._tasks.append(asyncio.create_task(self._own(), name="redis"))

    async def close(self) -> None:
        """What has not been answered is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for call in self._calls:
            call.reply.cancel()
        with suppress(*LOST, exceptions.RedisError):
            await self._client.aclose()

    def away_s(self) -> float:
        """Seconds for which Redis has not answered; 0 when it does."""
        return 0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s

    async def look(self, within_s: float) -> None:
        """Ask Redis about itself, for `metrics`."""
        try:
            async with asyncio.timeout(within_s):
                self.metrics.know(await self._client.info("memory", "clients", "stats"))
        except (*LOST, exceptions.RedisError):
            self.metrics.know({})

    async def call(self, name: str, *args: Any, within_s: float | None = None) -> Any:
        """Raises `Unavailable` if Redis has not answered in time, or has no memory for it; then it may still happen."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append(_Call(name, args, reply))
        self._wake.set()
        try:
            async with asyncio.timeout(within_s):
                return await reply
        except TimeoutError:
            raise Unavailable("the queue can't be reached") from None

    def listen(self, handlers: Mapping[str, Handler], subscribed: Callable[[], None] = lambda: None) -> None:
        """Subscribe, for as long as the link is open; `subscribed` is called after each time it began (again), since
        messages may have been lost before."""
        told = {(PREFIX + channel).encode(): handler for channel, handler in handlers.items()}
        self._tasks.append(asyncio.create_task(self._hear(told, subscribed), name="subscription"))

    # --- the command connection --------------------------------------------------------------------------------------

    async def _own(self) -> None:
        while True:
            while not self._calls:
                self._wake.clear()
                await self._wake.wait()
            batch = [call for call in self._calls[:MAX_BATCH] if not call.reply.done()]
            del self._calls[:MAX_BATCH]
            again = await self._send(batch) if batch else []
            if again:
                self._calls[:0] = again
                await asyncio.sleep(AGAIN_S)

    async def _send(self, batch: list[_Call]) -> list[_Call]:
        """One round trip; those calls that must be sent again."""
        pipeline = self._client.pipeline(transaction=False)
        for call in batch:
            pipeline.execute_command("FCALL", f"millrace{PROTOCOL}_{call.name}", 1, PREFIX + "clock", *call.args)
        began_s = time.perf_counter()
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except LOST as error:
            self.metrics.failed(type(error).__name__)
            self._lost(error)
            return batch
        except Exception as error:  # of these calls: the others must not wait for ever on their account
            self.metrics.failed(type(error).__name__)
            logger.error("calls of Redis broke: %s", [call.name for call in batch], exc_info=error)
            for call in batch:
                self._settle(call, exceptions.RedisError(str(error)))
            return []
        finally:
            self.metrics.trip((call.name for call in batch), time.perf_counter() - began_s)
        again = [call for call, reply in zip(batch, replies, strict=True) if not self._settle(call, reply)]
        if not again:
            self._back()
        elif self._may_load and any(
            isinstance(reply, exceptions.ResponseError) and UNLOADED in str(reply) for reply in replies
        ):
            with suppress(*LOST, exceptions.RedisError):
                await self._load()
        return again

    def _settle(self, call: _Call, reply: Any) -> bool:
        """Give the caller its reply. False if there is none yet."""
        if isinstance(reply, exceptions.RedisError):
            self.metrics.failed(type(reply).__name__)
            told = str(reply)
            if isinstance(reply, exceptions.ConnectionError) or told.startswith(NOT_NOW) or UNLOADED in told:
                self._lost(reply)
                return False
            if not call.reply.done():
                full = isinstance(reply, exceptions.OutOfMemoryError) or told.startswith("OOM")
                call.reply.set_exception(Unavailable("the queue's memory is full", 10) if full else _broken(call, told))
        elif not call.reply.done():
            call.reply.set_result(reply)
        return True

    def _lost(self, error: Exception) -> None:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            told = "its functions are not loaded yet" if UNLOADED in str(error) else error
            logger.warning("Redis at %s does not answer: %s", self._where, told)

    def _back(self) -> None:
        if self._away_since_s is not None:
            logger.warning("Redis at %s answers again after %.1f s", self._where, self.away_s())
            self._away_since_s = None

    async def _load(self) -> None:
        await self._client.function_load(source(), replace=True)

    async def _load_or_find(self) -> None:
        try:
            await self._load()
        except exceptions.NoPermissionError:
            self._may_load = False
            await self._client.fcall(f"millrace{PROTOCOL}_reap", 1, PREFIX + "clock")  # the name tells the version

    # --- the subscription --------------------------------------------------------------------------------------------

    async def _hear(self, handlers: Mapping[bytes, Handler], subscribed: Callable[[], None]) -> None:
        while True:
            with suppress(*LOST, exceptions.RedisError):
                async with self._client.pubsub() as pubsub:
                    await pubsub.subscribe(*handlers)
                    await self._hand_on(pubsub, handlers, subscribed)
            await asyncio.sleep(AGAIN_S)

    async def _hand_on(self, pubsub: Any, handlers: Mapping[bytes, Handler], subscribed: Callable[[], None]) -> None:
        """Until the connection breaks, or has not even answered a ping."""
        silent_s, pinged = 0.0, False
        while True:
            message = await pubsub.get_message(timeout=ANSWER_S)
            if message is None:
                silent_s += ANSWER_S
                if pinged and silent_s > 2 * ANSWER_S:
                    return
                await pubsub.ping()
                pinged = True
                continue
            silent_s, pinged = 0.0, False
            if message["type"] == "subscribe":
                subscribed()
            elif message["type"] == "message":
                handlers[message["channel"]](message["data"])


def source() -> str:
    """The library of functions."""
    return files("service.broker").joinpath("functions.lua").read_text(encoding="utf-8")


def hand_back(url: str, name: str, failed: bool, within_s: float = 5.0) -> int:
    """For a parent whose engine process died: its requests go back to the queue at once, each with a crash counted.
    It counts three times as much if the engine `failed` by itself: one that was killed may have done no wrong.

    Returns how many. Where Redis does not answer, the worker's lease will run out all the same: -1.
    """
    client = redis.Redis.from_url(
        url, retry=Retry(NoBackoff(), 0), socket_timeout=ANSWER_S, socket_connect_timeout=CONNECT_S, protocol=2
    )
    until_s = time.monotonic() + within_s
    with client:
        while True:
            try:
                num: int = client.fcall(f"millrace{PROTOCOL}_lose", 1, PREFIX + "clock", name, int(failed))
                return num
            except exceptions.RedisError:
                if time.monotonic() > until_s:
                    return -1
                time.sleep(AGAIN_S)


def check(url: str, load: bool = False) -> None:
    """The start's checks alone, for a process that keeps no connection; with `load` it also loads the functions.
    Raises `StartupError`."""
    try:
        with redis.Redis.from_url(
            url, retry=Retry(NoBackoff(), 0), socket_timeout=ANSWER_S, socket_connect_timeout=CONNECT_S, protocol=2
        ) as client:
            info = client.info()
            if load:
                client.function_load(source(), replace=True)
    except exceptions.RedisError as error:
        raise StartupError(_refusal(error, _where(url))) from None
    except ValueError:
        raise StartupError(BAD_URL) from None
    _check_info(info, _where(url))


BAD_URL = "--redis-url can't be read; write it as redis://[user:password@]host:port/0, or rediss:// for TLS"


def _client(url: str) -> "redis.asyncio.Redis":
    try:
        return redis.asyncio.Redis.from_url(
            url,
            retry=AsyncRetry(NoBackoff(), 0),
            socket_timeout=ANSWER_S,
            socket_connect_timeout=CONNECT_S,
            protocol=2,
            max_connections=4,
        )
    except ValueError:
        raise StartupError(BAD_URL) from None


def _where(url: str) -> str:
    """Host and port, never the password."""
    bare = url.partition("?")[0]
    return bare.rpartition("@")[2].partition("//")[2] or bare.rpartition("@")[2]


def _refusal(error: exceptions.RedisError, where: str) -> str:
    told = str(error)
    if UNLOADED in told:
        fix = f"millrace load-functions --redis-url redis://admin:password@{where}"
        return f"Redis at {where} lacks this version's functions, which this user may not load; who may, runs: {fix}"
    if isinstance(error, exceptions.NoPermissionError):
        return f"Redis at {where} does not allow this user what it needs: {told}; see deploy/redis/users.acl"
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError) or told.startswith(
        ("NOAUTH", "WRONGPASS")
    ):
        return (
            f"Redis at {where} refuses the password; give user and password: --redis-url redis://user:password@{where}"
        )
    if "CERTIFICATE_VERIFY_FAILED" in told:
        fix = "give the PEM file of who certified it: --redis-ca-file FILE, and the host by its certified name"
        return f"Redis at {where} shows a certificate that is not trusted; {fix}"
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError):
        return (
            f"Redis can't be reached at {where}; start it (redis-server) or give another: --redis-url redis://host:port"
        )
    return f"Redis at {where} refuses: {told}; Redis 7 or newer is needed"


def _check_info(info: Mapping[str, Any], where: str) -> None:
    version = str(info.get("redis_version", "0"))
    if int(version.partition(".")[0]) < 7:
        raise StartupError(f"Redis at {where} is {version}; install Redis 7 or newer")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        fix = "redis-cli config set maxmemory-policy noeviction, and the same in redis.conf"
        raise StartupError(f"Redis at {where} evicts keys ({policy}) and would lose requests; set: {fix}")


def _broken(call: _Call, told: str) -> MillraceError:
    if told.startswith("NOPERM"):
        return Unavailable(f"Redis does not allow {call.name}: {told}")
    return MillraceError(f"{call.name} failed in Redis: {told}")
