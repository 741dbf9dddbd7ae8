"""How much of prompts goes into a step, from how long steps take."""

import random
from dataclasses import dataclass, replace

import pytest

from model.engine.pace import LEAST, Pace
from tests.model.conftest import MakeEngine
from tests.model.test_engine import mixed_requests, outputs
from tests.model.test_scheduler import ROOMY, Bench


@dataclass(frozen=True)
class Machine:
    """Seconds of a step: in any case, for each that decodes; more where anybody reads, and for each token read."""

    step_s: float = 0.030
    row_s: float = 0.0006
    fixed_s: float = 0.0
    token_s: float = 0.001
    noise: float = 0.0

    def seconds(self, num_decoding: int, num_read: int, rng: random.Random) -> float:
        seconds = self.step_s + self.row_s * num_decoding + (self.fixed_s + self.token_s * num_read) * (num_read > 0)
        return seconds * (1 + rng.random() * self.noise) * (5 if self.noise and rng.random() < 0.03 else 1)

    def reads(self, num_reading: int, num_prompts: int = 60) -> tuple[Pace, list[int]]:
        """Sixteen read their prompts and decode, then others arrive: tokens that each step reads then."""
        pace, rng, read = Pace(512), random.Random(5), list[int]()
        for _ in range(4):
            pace.told(0, 512, self.seconds(0, 512, rng))
        for _ in range(20):
            pace.told(16, 0, self.seconds(16, 0, rng))
        for _ in range(num_prompts):
            read.append(pace.budget(16, num_reading) - 16)
            pace.told(16, read[-1], self.seconds(16, read[-1], rng))
        return pace, read


def longer(machine: Machine, read: list[int]) -> list[float]:
    """How many times as long as a step without reading."""
    calm = replace(machine, noise=0.0)
    decode_s = calm.seconds(16, 0, random.Random())
    return [calm.seconds(16, num, random.Random()) / decode_s for num in read]


@pytest.mark.parametrize("machine", [Machine(), Machine(token_s=0.0001), Machine(fixed_s=0.01), Machine(noise=0.1)])
def test_one_that_reads_makes_steps_of_many_almost_twice_as_long(machine: Machine) -> None:
    _, read = machine.reads(1)
    assert max(longer(machine, read[10:])) < 2.0 and max(longer(machine, read)) < 2.5
    assert sum(longer(machine, read)) / len(read) > 1.5


def test_where_reading_costs_much_in_any_case_it_is_not_cut_to_crumbs() -> None:
    machine = Machine(step_s=0.002, row_s=0.0, fixed_s=0.010, token_s=0.00005)  # a GPU's step without its graph
    _, read = machine.reads(1)
    assert min(read[10:]) >= 90 and max(longer(machine, read[10:])) < 11


def test_many_that_read_are_not_held_up_by_a_few_that_decode() -> None:
    pace, read = Machine().reads(64)
    assert max(read[10:]) > 3 * max(Machine().reads(1)[1][10:])
    assert pace.budget(1, 40) == pace.budget(0, 3) == pace.budget(16, 0) == 512


def test_nothing_is_held_back_on_a_guess_and_everyone_gets_on() -> None:
    assert Pace(512).budget(16, 1) == 512
    assert min(Machine(token_s=1.0).reads(1)[1]) == LEAST


def test_a_long_prompt_is_cut_so_that_those_who_decode_go_on() -> None:
    bench = Bench(replace(ROOMY, max_batch_tokens=100, max_model_len=1000, num_blocks=1000))
    for id in "ab":
        bench.add(id, 4)
    bench.step()
    bench.scheduler.pace.told(2, 0, 0.01)
    for num_read in (10, 20):
        bench.scheduler.pace.told(2, num_read, 0.01 + num_read * 0.0004)
    bench.add("long", 90)
    assert [bench.step()[0] for _ in range(2)] == [{"a": 1, "b": 1, "long": 17}] * 2


def test_how_a_step_is_filled_does_not_show_in_the_tokens(make_engine: MakeEngine) -> None:
    requests, engine = mixed_requests(24, max_prompt=200), make_engine()
    engine.scheduler.pace.told = lambda *step: None  # type: ignore[method-assign]
    engine.scheduler.pace.budget = lambda num_decoding, num_reading: num_decoding + 3  # type: ignore[method-assign]
    assert outputs(engine, requests) == outputs(make_engine(), requests)
