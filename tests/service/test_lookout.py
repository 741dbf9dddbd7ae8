"""An API process among workers: whom its requests may go to, and what it says when there is nobody."""

from dataclasses import replace

import pytest

from model.fingerprint import Fingerprint
from service.broker.redis import PROTOCOL, WorkerInfo
from service.lookout import NO_WORKER, Lookout

ONE = WorkerInfo("q1", "door", "weights", "float32", 512, PROTOCOL)
OTHER = replace(ONE, queue="q2", max_model_len=256)
HALF = replace(ONE, queue="q3", dtype="bfloat16")
BYTES = replace(ONE, queue="q4", dtype="float32-int8")


def looking(*workers: WorkerInfo, weights: str | None = "weights", dtype: str = "auto") -> Lookout:
    lookout = Lookout(Fingerprint("door", weights), dtype)
    lookout.see(workers)
    return lookout


def test_with_no_worker_it_says_how_to_start_one() -> None:
    lookout = looking()
    assert (lookout.chosen, lookout.complaint) == (None, NO_WORKER)


def test_the_queue_of_most_workers_is_chosen_and_kept_while_one_of_its_workers_lives() -> None:
    lookout = looking(OTHER, ONE, ONE)
    assert (lookout.chosen, lookout.num_fitting, lookout.complaint) == (ONE, 2, None)
    lookout.see([OTHER, OTHER, ONE])
    assert (lookout.chosen, lookout.num_fitting) == (ONE, 1)
    lookout.see([OTHER])
    assert lookout.chosen == OTHER


def test_a_queue_whose_workers_are_gone_is_kept_until_others_fit() -> None:
    lookout = looking(ONE)
    lookout.see([])
    assert (lookout.chosen, lookout.num_fitting, lookout.complaint) == (ONE, 0, NO_WORKER)


def test_processes_that_see_the_same_choose_the_same() -> None:
    assert looking(ONE, OTHER).chosen == looking(OTHER, ONE).chosen


@pytest.mark.parametrize(
    ("worker", "told"),
    [
        (replace(ONE, door="x"), "config or tokenizer"),
        (replace(ONE, weights="x"), "weights differ"),
        (HALF, "bfloat16, not float32"),
        (replace(ONE, protocol=PROTOCOL + 1), f"protocol {PROTOCOL + 1}, not {PROTOCOL}"),
    ],
)
def test_a_worker_of_another_kind_is_not_chosen_and_the_difference_is_named(worker: WorkerInfo, told: str) -> None:
    lookout = looking(worker, dtype="float32")
    assert lookout.chosen is None
    assert lookout.complaint is not None
    assert told in lookout.complaint
    assert looking(worker, ONE, dtype="float32").chosen == ONE


def test_of_several_misfits_the_closest_is_described() -> None:
    complaint = looking(replace(HALF, weights="x"), HALF, dtype="float32").complaint
    assert complaint is not None
    assert "2 workers" in complaint
    assert "weights" not in complaint


def test_without_weights_of_its_own_and_with_any_dtype_it_takes_what_there_is() -> None:
    assert looking(replace(HALF, weights="x"), weights=None).chosen == replace(HALF, weights="x")


@pytest.mark.parametrize(
    ("worker", "asked", "told"),
    [
        (BYTES, "none", "its --quantize is int8, not none"),
        (ONE, "int8", "its --quantize is none, not int8"),
        (BYTES, "int8", None),
        (BYTES, None, None),
    ],
)
def test_how_weights_are_quantised_counts_only_if_it_is_asked_for(
    worker: WorkerInfo, asked: str | None, told: str | None
) -> None:
    lookout = Lookout(Fingerprint("door", "weights"), "float32", asked)
    lookout.see([worker])
    assert (lookout.chosen is None) == (told is not None)
    assert (told or "") in (lookout.complaint or "")
