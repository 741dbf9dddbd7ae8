"""Locust users that stream, in a closed or an open loop: `make load`, or

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 [Generate] [Chat] [Conversation] [options]

Closed, so many users (`-u`) ask, read to the end, think, and ask again. Open, with `--rate` or `--trace`, requests come
when they are due, however long the server takes; several kinds are then drawn evenly. Name the kinds that you want,
else all three come. `--dialect openai` asks any server that speaks OpenAI's routes. Workers as Locust has them:
`--processes 4`, or `--master` and `--worker`; each sends its share. The parts are in `loadtests/load`.
"""

import itertools
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from loadtests.load import options as command_line
from loadtests.load.schedule import dealt, poisson, replayed, share_at
from loadtests.load.stage import Stage
from loadtests.load.traces import Arrival, read, smaller

DRAIN_S = 60.0  # for what is running when the time is over
GRACE_S = 5.0  # a worker begins later than its master's clock, and sends what is due all the same
BACK_S = 10.0
MOST_OPEN = 10_000


class Visitor(User):
    """Does one kind of visit again and again, with a moment's thought between."""

    abstract = True

    def on_start(self) -> None:
        self.stage: Stage = self.environment.stage
        self.client = self.stage.connect()

    def on_stop(self) -> None:
        self.client.close()

    def wait_time(self) -> float:
        return self.stage.think_s()

    @task
    def visit(self) -> None:
        if not self.stage.is_over:  # a user that is told to stop while it thinks may wake once more
            self.stage.visits[type(self).__name__](self.client, None, None)


class Generate(Visitor):
    """The native route; of other servers, completions."""


class Chat(Visitor):
    """Chats of one turn."""


class Conversation(Visitor):
    """Chats of several turns."""


class OpenLoop(User):
    """One in each process: sends its share of the arrivals, each by a client that waits for nobody."""

    def on_start(self) -> None:
        self.stage: Stage = self.environment.stage
        self.client = self.stage.connect(MOST_OPEN)

    @task
    def play(self) -> None:
        """The whole run. What is on its way at the end may come to its end."""
        stage, clients = self.stage, Group()
        began_s, began_at_s = time.time(), time.perf_counter()
        try:
            for at_s, wished in _arrivals(stage):
                if (early_s := at_s - (time.perf_counter() - began_at_s)) > 0:
                    gevent.sleep(early_s)
                if stage.over_since_s is not None and time.perf_counter() > stage.over_since_s + GRACE_S:
                    break
                visit = stage.visits[stage.rng.choice(stage.options.kinds)]
                clients.spawn(visit, self.client, began_s + at_s, wished)
            clients.join()
            while not stage.is_over:
                gevent.sleep(0.1)
        finally:
            clients.kill()
            self.client.close()
        raise StopUser  # or Locust, which may not have told it yet, would have it begin again


def _arrivals(stage: Stage) -> Iterator[tuple[float, Arrival | None]]:
    """When, and how long, for this process: all of them draw the same whole and take their share."""
    options, index = stage.options, getattr(stage.environment.runner, "worker_index", 0)
    if options.trace:
        trace = replayed(read(Path(options.trace)), options.speed, options.run_s)
        for one in dealt(trace, index, options.num_shares):
            yield one.at_s, smaller(one, options.scale, stage.facts.longest)
        return
    run_s = options.run_s or 1e9
    due_s = poisson(
        options.rate, run_s, lambda at: share_at(options.shape, at, options.steps), random.Random(options.draw)
    )
    yield from zip(dealt(due_s, index, options.num_shares), itertools.repeat(None))


class Shape(LoadTestShape):
    """The number of users over the run time, for a closed loop."""

    abstract = True  # chosen by --shape, not by being here

    def __init__(self, environment: Environment) -> None:
        super().__init__()
        self.runner, self._options = environment.runner, environment.parsed_options

    def tick(self) -> tuple[int, float]:
        progress = min(0.999, self.get_run_time() / self._options.run_s)  # the end is not told here: see `_end`
        num_users = round(self._options.num_users * share_at(self._options.shape, progress, self._options.steps))
        return max(1, num_users), 100.0


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    command_line.add(parser)


@events.init.add_listener
def _set_up(environment: Any, **_: Any) -> None:
    """Before anything runs: a stage in each process; where the test is led from, open or closed, and for how long."""
    environment.stage = Stage(environment)
    options, runner = environment.parsed_options, environment.runner
    if isinstance(runner, WorkerRunner):
        environment.user_classes = [Generate, Chat, Conversation, OpenLoop]  # its master says which
        return
    environment.stop_timeout = environment.stop_timeout or DRAIN_S
    chosen = [each for each in environment.user_classes if each is not OpenLoop]
    is_open = options.rate is not None or bool(options.trace)
    if is_open:
        options.kinds = [each.__name__ for each in chosen]
        options.num_users = max(1, options.expect_workers if isinstance(runner, MasterRunner) else 1)
        options.spawn_rate = 100
        if options.trace:
            last_s = read(Path(options.trace))[-1].at_s / options.speed
            options.run_time = min(options.run_time or last_s, last_s) + 0.001
    elif options.shape != "flat":
        if not options.run_time:
            raise SystemExit("--shape: give the run time, -t")
        environment.shape_class = Shape(environment)
    environment.user_classes = [OpenLoop] if is_open else chosen
    options.run_s = options.run_time
    if options.headless and options.run_time:
        options.run_time += 10 * DRAIN_S  # a guard: Locust's own end would have a master wait for nobody


@events.test_start.add_listener
def _open(environment: Any, **_: Any) -> None:
    options, runner = environment.parsed_options, environment.runner
    if not isinstance(runner, WorkerRunner) and options.headless and options.run_s:
        gevent.spawn(_end, environment)
    if isinstance(runner, MasterRunner):
        options.num_shares = runner.worker_count
        return
    options.num_shares = getattr(options, "num_shares", 1)
    try:
        environment.stage.open()
    except (OSError, RuntimeError, KeyError) as error:
        logging.error("the server can't be asked: %s", error)
        environment.process_exit_code = 1
        gevent.spawn(runner.quit)


def _end(environment: Any) -> None:
    """After the run time: what is under way may end, in all processes, and then Locust does. A master hears what its
    workers have still to tell when they are ready again and are then told to quit."""
    runner = environment.runner
    num_workers = runner.worker_count if isinstance(runner, MasterRunner) else 0
    gevent.sleep(environment.parsed_options.run_s)
    runner.stop()
    with gevent.Timeout(BACK_S, False):
        while num_workers and len(runner.clients.ready) < num_workers:
            gevent.sleep(0.05)
    runner.quit()


@events.test_stop.add_listener
def _be_ready(environment: Any, **_: Any) -> None:
    """A worker that has stopped waits for as long as its users may take, though they are gone; but not so here."""
    if isinstance(environment.runner, WorkerRunner):
        environment.stop_timeout = 0.0


@events.test_stopping.add_listener
def _wind_up(environment: Any, **_: Any) -> None:
    environment.stage.over_since_s = time.perf_counter()
