import pytest

from model.engine.sequence import Sequence
from model.request import Finish, FinishReason, Request, SamplingParams

EOS, STOP_ID = 0, 1


@pytest.mark.parametrize(
    ("output_ids", "sampling", "finish"),
    [
        ((5, EOS), {}, Finish(FinishReason.STOP)),
        ((5, STOP_ID), {}, Finish(FinishReason.STOP, stop_reason=STOP_ID)),
        ((STOP_ID, 5), {}, None),
        ((5, STOP_ID), {"min_tokens": 2}, None),
        ((5, STOP_ID), {"min_tokens": 1}, Finish(FinishReason.STOP, stop_reason=STOP_ID)),
        ((5, EOS), {"max_tokens": 2}, Finish(FinishReason.STOP)),
        ((5, 6), {"max_tokens": 2}, Finish(FinishReason.LENGTH)),
        ((5, 6, 7), {}, Finish(FinishReason.LENGTH)),  # 2 + 3 tokens: the longest this network takes
        ((), {}, None),
    ],
)
def test_how_ids_end_a_sequence(output_ids: tuple[int, ...], sampling: dict[str, int], finish: Finish | None) -> None:
    params = SamplingParams(stop_token_ids=(EOS, STOP_ID), eos_ids=(EOS,), **sampling)  # type: ignore[arg-type]
    assert Sequence(Request("a", (2, 3), params), 5, list(output_ids)).end() == finish


def test_ids_run_over_prompt_and_output() -> None:
    sequence = Sequence(Request("a", (10, 11, 12)), 100, [13, 14])
    for start in range(5):
        for stop in range(start, 6):
            assert sequence.ids(start, stop) == [10, 11, 12, 13, 14][start:stop]
