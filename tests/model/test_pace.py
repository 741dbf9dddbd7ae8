"""How much of prompts goes into a step, from how long steps take."""

from dataclasses import replace

import pytest

from model.engine.pace import LEAST, Pace
from tests.model.conftest import MakeEngine
from tests.model.test_engine import mixed_requests, outputs
from tests.model.test_scheduler import ROOMY, Bench


def known(decode_s: float = 0.04, read_s: float = 0.001) -> Pace:
    """Of a machine on which sixteen decode in `decode_s`, and one more token of a prompt takes `read_s`."""
    pace = Pace(512)
    pace.told(16, 0, decode_s)
    pace.told(16, 100, decode_s + 100 * read_s)
    return pace


@pytest.mark.parametrize(
    ("num_decoding", "num_reading", "budget"),
    [
        (16, 0, 512),
        (0, 3, 512),
        (16, 1, 16 + 40),
        (16, 16, 16 + 40),
        (16, 64, 16 + 160),
        (1, 31, 512),
        (12, 1, 12 + 40),
    ],
)
def test_who_reads_gets_as_much_time_as_who_decodes(num_decoding: int, num_reading: int, budget: int) -> None:
    assert known().budget(num_decoding, num_reading) == budget


def test_nothing_is_held_back_on_a_guess_and_everyone_gets_on() -> None:
    assert Pace(512).budget(16, 1) == 512
    assert known(read_s=1.0).budget(16, 1) == 16 + LEAST


def test_it_follows_what_is_measured_but_not_every_outlier() -> None:
    pace = known()
    pace.told(16, 0, 4.0)
    assert pace.budget(16, 1) < 16 + 60
    for _ in range(40):
        pace.told(16, 40, 0.04 + 40 * 0.002)
        pace.told(16, 0, 0.04)
    assert pace.budget(16, 1) in range(16 + 19, 16 + 23)


def test_a_long_prompt_is_cut_so_that_those_who_decode_go_on() -> None:
    bench = Bench(replace(ROOMY, max_batch_tokens=100, max_model_len=1000, num_blocks=1000))
    for id in "ab":
        bench.add(id, 4)
    bench.step()
    bench.scheduler.pace.told(2, 0, 0.01)
    bench.scheduler.pace.told(2, 10, 0.015)
    bench.add("long", 90)
    assert [bench.step()[0] for _ in range(2)] == [{"a": 1, "b": 1, "long": 20}] * 2


def test_how_a_step_is_filled_does_not_show_in_the_tokens(make_engine: MakeEngine) -> None:
    requests, engine = mixed_requests(24, max_prompt=200), make_engine()
    engine.scheduler.pace.told = lambda *step: None  # type: ignore[method-assign]
    engine.scheduler.pace.budget = lambda num_decoding, num_reading: num_decoding + 3  # type: ignore[method-assign]
    assert outputs(engine, requests) == outputs(make_engine(), requests)
