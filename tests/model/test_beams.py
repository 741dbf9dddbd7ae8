"""Beam search beside transformers' own, and whatever else happens in the engine meanwhile."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from model.engine.engine import Engine
from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder
from model.request import FinishReason, Request, SamplingParams
from model.tokenizer import Tokenizer
from tests.model.conftest import TINY, MakeEngine, random_decoder
from tests.model.test_encoder_decoder import save_tokenizer, t5
from tests.model.test_sources import BYTES, answers, asks, engine_of, run

__all__ = ["t5"]
SEARCH = SamplingParams(beam_width=3, max_tokens=20, stop_token_ids=(7, 8), eos_ids=(7,))


def searches(id: str, num_prompt: int, **changes: Any) -> Request:
    return Request(id, tuple((5 * i + 3) % 256 for i in range(num_prompt)), replace(SEARCH, **changes))


def naive(decoder: Decoder, request: Request) -> list[int]:
    """The same search with everything computed again for every beginning in every round."""
    params = request.sampling
    begun, ended = [(0.0, list[int]())], list[tuple[float, list[int]]]()
    for length in range(1, params.max_tokens + 1):
        found = [
            (score + logprob, [*ids, i])
            for score, ids in begun
            for i, logprob in enumerate(_logprobs(decoder, [*request.prompt_ids, *ids]).tolist())
        ]
        found.sort(key=lambda each: -each[0])
        weight = length**params.length_penalty
        likely = found[: params.beam_width]
        ended += [(score / weight, ids) for score, ids in likely if ids[-1] in params.stop_token_ids]
        ended = sorted(ended, key=lambda each: -each[0])[: params.beam_width]
        begun = [each for each in found if each[1][-1] not in params.stop_token_ids][: params.beam_width]
        if len(ended) == params.beam_width and ended[-1][0] >= begun[0][0] / weight:
            break
    else:
        ended += [(score / weight, ids) for score, ids in begun]
    return max(ended)[1]


@torch.inference_mode()
def _logprobs(decoder: Decoder, ids: list[int]) -> Tensor:
    ops = DenseAttention(decoder.config, 1, len(ids))
    hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), ops)
    return decoder.logits(hidden[-1:], ops)[0].log_softmax(-1)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_prompt", [1, 15, 16, 40])
def test_a_search_is_the_naive_one(make_engine: MakeEngine, num_prompt: int, length_penalty: float) -> None:
    request = searches("a", num_prompt, length_penalty=length_penalty)
    (delta,) = run(make_engine(), [request])["a"][-1:]
    assert list(delta.token_ids) == naive(random_decoder(TINY), request)
    assert delta.finish is not None
    stopped = delta.token_ids[-1] in SEARCH.stop_token_ids
    assert delta.finish.reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert delta.finish.stop_reason == (8 if delta.token_ids[-1] == 8 else None)


@pytest.mark.parametrize("length_penalty", [0.6, 1.5])
def test_a_search_is_that_of_transformers(t5: tuple[Path, nn.Module], length_penalty: float) -> None:
    folder, theirs = t5
    save_tokenizer(folder)
    engine = Engine.load(folder, max_model_len=64, max_num_seqs=8)
    params = SamplingParams(
        beam_width=4, length_penalty=length_penalty, max_tokens=12, stop_token_ids=(1,), eos_ids=(1,)
    )
    for source in (tuple(range(3, 50)), tuple(range(30, 35))):
        (delta,) = run(engine, [Request("a", (0,), params, source_ids=source)])["a"]
        wanted = cast(Any, theirs).generate(
            torch.tensor([source]), max_new_tokens=12, do_sample=False, use_cache=False, num_beams=4,
            length_penalty=length_penalty, early_stopping=False,
        )  # fmt: skip
        assert [0, *delta.token_ids] == wanted[0].tolist()


def test_a_search_among_others_is_the_one_alone(byte_tokenizer: Tokenizer) -> None:
    decoder = random_decoder(BYTES)
    crowd = [asks("a", 40), asks("b", 9), asks("c", 30, temperature=1.0)]
    for i, width in enumerate((2, 3, 4)):
        crowd.append(replace(asks(f"s{i}", 20 + i), sampling=replace(SEARCH, beam_width=width)))
    wanted = {id: each for r in crowd for id, each in answers(run(engine_of(decoder, byte_tokenizer), [r])).items()}
    assert answers(run(engine_of(decoder, byte_tokenizer, max_num_seqs=6, max_batch_tokens=48), crowd)) == wanted


def test_a_search_comes_back_from_preemption(byte_tokenizer: Tokenizer) -> None:
    """Those who come first take the blocks of its beginnings one by one, of those that are held too."""
    decoder = random_decoder(BYTES)
    search = replace(asks("s", 20), sampling=replace(SEARCH, beam_width=4, max_tokens=80, stop_token_ids=()))
    wanted = answers(run(engine_of(decoder, byte_tokenizer), [search]))["s"]
    engine = engine_of(decoder, byte_tokenizer, num_blocks=24)
    engine.add(search)
    assert not [delta for _ in range(12) for delta in engine.step()]
    for i in range(6):
        engine.add(replace(asks(f"{i}", 5, max_tokens=100), priority=-1))
    deltas = [delta for _ in range(600) for delta in engine.step()]
    assert answers({"s": [delta for delta in deltas if delta.id == "s"]})["s"] == wanted
    assert sum(len(delta.token_ids) for delta in deltas) == 680
    assert engine.stats().preemptions_total > 3 and not engine.has_work()


def test_beginnings_share_what_they_have_in_common(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(searches("a", 160, beam_width=4))
    for _ in range(6):
        engine.step()
    stats = engine.stats()
    assert stats.num_running == 4
    assert stats.num_blocks - stats.num_free_blocks <= 10 + 4  # ten full ones of all, and one for each
    assert stats.prompt_tokens_total == 160
    engine.cancel("a")
    assert engine.stats().num_free_blocks == stats.num_blocks and not engine.has_work()


def test_a_search_that_can_never_run_ends_as_an_error(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=6)
    (delta,) = run(engine, [searches("a", 40)])["a"]
    assert delta.finish is not None and "3 beams of 60 tokens need 3 seats and 12 cache blocks" in str(delta.finish)
