"""What the benchmark against peers says of what it measured: ratios, bars, and reasons for doubt."""

import pytest

from loadtests.peers.bars import BARE, LLAMA, OPENVINO, OURS, Point, Turn, disagreements, doubts, verdicts
from loadtests.peers.checkpoints import SHAPES
from loadtests.peers.contenders import Run
from loadtests.peers.report import num_together


def turn(seconds: float, num_streams: int = 32, first_id: int = 7, ttft_s: float = 0.5, gap_s: float = 0.5) -> Turn:
    """Three tokens for each stream."""
    ttfts_s, gaps_s = [ttft_s] * num_streams, [gap_s] * 2 * num_streams
    full = Run(seconds, [[first_id, 1, 2]] * num_streams, 2.0, 0.0, ttfts_s=ttfts_s, gaps_s=gaps_s)
    return Turn(full, Run(seconds / 2, [[first_id]] * num_streams, cores=2.0, foreign=0.0))


def point(**turns: list[Turn]) -> Point:
    names = {"ours": OURS, "bare": BARE, "llama": LLAMA, "openvino": OPENVINO}
    return Point("S", "bf16", 32, 128, 3, {names[name]: each for name, each in turns.items()})


def found(point: Point, what: str) -> tuple[float | None, bool | None]:
    [verdict] = [verdict for verdict in verdicts(point) if verdict.what.startswith(what)]
    return verdict.value, verdict.is_met


def test_a_ratio_is_the_median_of_the_turns_and_not_of_the_figures() -> None:
    measured = point(ours=[turn(1), turn(2), turn(10)], llama=[turn(4), turn(7), turn(20)])
    assert found(measured, "output, served, by llama-server") == (3.5, True)
    assert found(measured, "prefill, served, by llama-server") == (3.5, True)


def test_a_wait_must_be_short_and_a_rate_high() -> None:
    measured = point(ours=[turn(1, ttft_s=0.2)], llama=[turn(1, ttft_s=0.3, gap_s=0.1)])
    ttft, is_met = found(measured, "TTFT p50")
    assert ttft == pytest.approx(2 / 3) and not is_met
    assert found(measured, "inter-token p99") == (5.0, False)


def test_a_peer_that_is_not_there_proves_nothing() -> None:
    measured = point(ours=[turn(1)], bare=[turn(1)])
    assert {verdict.is_met for verdict in verdicts(measured)} == {None}


def test_too_few_tokens_foreign_load_and_another_network_are_doubted() -> None:
    measured = point(ours=[turn(1)], llama=[turn(1, first_id=8)])
    measured.num_new = 4
    said = "\n".join(doubts(measured, num_threads=2))
    assert "tokens a stream, not 4" in said
    assert disagreements(measured.turns) == [
        "llama-server: only 0 of 32 first tokens are ours; is it the same network?"
    ]
    assert not disagreements(point(ours=[turn(1)], llama=[turn(1)]).turns)


def test_the_roof_is_the_best_sweep_by_the_bytes_of_a_token() -> None:
    measured = Point("M", "bf16", 1, 128, 3, {BARE: [turn(2.0, num_streams=1)]}, sweeps=[300.0, 400.0], step_bytes=100)
    assert measured.roof_share() == pytest.approx(0.5)  # two tokens a second after the prompt, of four


def test_streams_that_wait_for_each_other_are_not_together() -> None:
    assert num_together(turn(1)) == 32
    queued = Run(1, [[1, 2]] * 2, 2.0, 0.0, ttfts_s=[0.1, 0.9], gaps_s=[0.1, 0.1])
    assert num_together(Turn(queued, queued)) == 1


def test_shapes_have_the_sizes_that_they_are_called_by() -> None:
    numbers = {name: shape.linear_weights() / 1e6 for name, shape in SHAPES.items()}
    assert numbers == {"S": pytest.approx(15, abs=1), "M": pytest.approx(135, abs=1), "L": pytest.approx(1034, abs=1)}
