"""After a test nothing may be left of it: not in Redis, not in a process. Keys and their meaning are those of the table
in `service/broker/redis.py`.
"""

from collections.abc import Iterator

from tests.faults.procs import Api, Cluster, wait
from tests.faults.redis_server import RedisServer

PREFIX = "millrace:{0}:"
FOR_EVER = ("clock", "workers", "due", "orphan", "dead")  # keys that may have no expiry
MAX_CONNECTIONS = 10  # of one process to Redis


def left_in_redis(redis: RedisServer, num_workers: int) -> list[str]:
    """What is not as it was before there was a request, apart from ended ones that are still kept."""
    return list(_left_in_redis(redis, num_workers))


def _left_in_redis(redis: RedisServer, num_workers: int) -> Iterator[str]:
    cli = redis.cli()
    ended = 0
    for raw in cli.scan_iter(PREFIX + "*", count=1000):
        key = raw.decode()
        kind = key.removeprefix(PREFIX).partition(":")[0]
        if kind not in FOR_EVER and cli.pttl(raw) == -1:
            yield f"{key} has no expiry"
        if kind in ("held", "rdy", "wait"):
            yield f"{key} is not empty"
        elif kind == "r":
            state = cli.hget(raw, "st")
            ended += state == b"e"
            if state is not None and state != b"e":
                yield f"{key} is in state {state!r}"
        elif kind in ("q", "t"):
            names = ("running", "tokens") if kind == "q" else ("open",)
            yield from (f"{key} {name} is {n!r}" for name in names if (n := cli.hget(raw, name)) not in (None, b"0"))
    if (announced := cli.zcard(PREFIX + "workers")) != num_workers:
        yield f"{announced} workers are announced, {num_workers} run"
    if (due := cli.zcard(PREFIX + "due")) > ended:
        yield f"{due} requests are due, {ended} are kept"
    if orphans := cli.zcard(PREFIX + "orphan"):
        yield f"{orphans} requests may become orphans"


def off_balance(api: Api) -> str | None:
    """Whether the books of an api do not add up, or something is still in flight, or it is just ending."""
    try:
        told = api.metrics()
    except OSError as error:
        return f"{api.name} does not tell its metrics: {error}"
    ended = sum(n for name, n in told.items() if name.startswith("millrace_requests_ended_total"))
    accepted, in_flight = told["millrace_requests_accepted_total"], told["millrace_requests_in_flight"]
    balanced = accepted == ended + in_flight and in_flight == 0
    return None if balanced else f"{api.name}: accepted {accepted}, ended {ended}, in flight {in_flight}"


def assert_clean(cluster: Cluster, fds: dict[str, int] | None = None, guard_s: float = 30.0) -> None:
    """Within `guard_s` everything is as before. `fds` are descriptors of apis by name, before the load."""
    workers = cluster.running_workers()

    def complaints() -> list[str]:
        apis = [api for api in cluster.apis if api.alive()]
        found = left_in_redis(cluster.redis, len(workers))
        found += [told for api in apis if (told := off_balance(api))]
        for process in (*workers, *apis):
            if (num := process.num_connections(cluster.redis_ports)) > MAX_CONNECTIONS:
                found.append(f"{process.name} has {num} connections to Redis")
        for api in apis:
            if fds and api.name in fds and (num := api.num_fds()) > fds[api.name] + 2:
                found.append(f"{api.name} has {num} descriptors, had {fds[api.name]}")
        return found

    last: list[str] = []

    def clean() -> bool:
        last[:] = complaints()
        return not last

    try:
        wait(clean, "clean", guard_s)
    except AssertionError:
        raise AssertionError(f"left behind after {guard_s:.0f} s: {last[:20]}") from None
