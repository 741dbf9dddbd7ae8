"""How much of prompts goes into a step, from how long steps take."""

import random
from dataclasses import dataclass, replace

import pytest

from model.engine.pace import LEAST, PROBE, PROBES, Pace
from model.request import Request, SamplingParams
from tests.model.conftest import MakeEngine
from tests.model.test_engine import mixed_requests, outputs
from tests.model.test_scheduler import ROOMY, Bench

NUM_BEFORE = 4  # steps that `Machine.reads` has read before


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
        for _ in range(NUM_BEFORE):
            pace.told(0, 512, self.seconds(0, 512, rng))
        for _ in range(20):
            pace.told(16, 0, self.seconds(16, 0, rng))
        for _ in range(num_prompts):
            read.append(pace.budget(16, num_reading) - 16)
            pace.told(16, read[-1], self.seconds(16, read[-1], rng))
        return pace, read


def without_probes(read: list[int]) -> list[int]:
    """All but the steps that read less to learn what a token costs."""
    return [num for i, num in enumerate(read, NUM_BEFORE) if i % PROBES]


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


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_a_long_context_costs_is_not_taken_for_a_price_of_reading_at_all(seed: int) -> None:
    """Prompts of 4,096 among sixteen streams, on a machine like the one of README's figures in bfloat16."""
    rng, half, decode_s = random.Random(seed), 750.0, 0.0058
    pace, longer = Pace(512, half), list[float]()
    for _ in range(3):
        position = 0
        for _ in range(20):
            pace.told(16, 0, decode_s)
        while position < 4096:
            num = min(4096 - position, pace.budget(16, 1, position) - 16)
            seconds = decode_s + 0.75e-6 * position + 33e-6 * num * (1 + (position + num / 2) / half)
            longer.append(seconds / decode_s)
            noise = (1 + rng.random() * 0.1) * (2.5 if rng.random() < 0.05 else 1)
            pace.told(16, num, seconds * noise, (position + num // 2) * num)
            position += num
    taught = sorted(longer[30:])  # it knew nothing when it began
    assert taught[int(0.99 * len(taught))] < 2.3 and len(longer) < 700


def test_where_reading_costs_much_in_any_case_it_is_not_cut_to_crumbs() -> None:
    machine = Machine(step_s=0.002, row_s=0.0, fixed_s=0.010, token_s=0.00005)  # a GPU's step without its graph
    _, read = machine.reads(1)
    assert min(without_probes(read)[10:]) >= 90 and max(longer(machine, read[10:])) < 11


def test_many_that_read_are_not_held_up_by_a_few_that_decode() -> None:
    pace, read = Machine().reads(64)
    assert max(read[10:]) > 3 * max(Machine().reads(1)[1][10:])
    assert pace.budget(1, 40) == pace.budget(0, 3) == pace.budget(16, 0) == 512


def test_a_burst_is_read_before_the_steps_run_half_empty() -> None:
    few, many = (max(Machine().reads(num)[1][10:]) for num in (1, 16))
    assert many > 3 * few


def test_nothing_is_held_back_on_a_guess_and_everyone_gets_on() -> None:
    assert Pace(512).budget(16, 1) == 512
    read = Machine(token_s=1.0).reads(1)[1]
    assert min(without_probes(read)) == LEAST and min(read) == LEAST * PROBE


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
    engine.scheduler.pace.budget = lambda num_decoding, *_: num_decoding + 3  # type: ignore[method-assign]
    assert outputs(engine, requests) == outputs(make_engine(), requests)


def test_it_is_told_where_in_its_text_a_prompt_is(make_engine: MakeEngine) -> None:
    engine, told = make_engine(max_batch_tokens=32), list[tuple[int, int]]()
    engine.scheduler.pace.told = lambda *step: told.append((step[1], step[3]))  # type: ignore[method-assign]
    engine.add(Request("long", tuple(range(5, 85)), SamplingParams(max_tokens=2)))
    while engine.has_work():
        engine.step()
    assert told == [(32, 32 * 16), (32, 32 * 48), (16, 16 * 72), (0, 0)]
    # Operations: 2 * 32 * (32 + 32 + 16 + 16 + 3 * 48) with a layer's weights, 4 * 32 for each position looked at.
    assert engine.config.attention_half == 120
