"""Whole answers: their shape, their numbers, and the ways in which there is none."""

import asyncio

import pytest

from model.request import Finish, FinishReason, TokenLogprob, child_seed
from service.broker.base import Entry
from service.errors import Overloaded, Unavailable
from tests.service.helpers_http import LENGTH, STOP, TOKENIZER, Door, Visitor, hang, say


async def test_the_answer_has_the_documented_shape() -> None:
    answer = (await Door(say("hello")).generate(seed=7)).json()
    assert answer["id"].startswith("gen-")
    assert (answer["model"], answer["seed"]) == ("tiny", 7)
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "hello",
            "token_ids": TOKENIZER.encode("hello"),
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7, "cached_tokens": 0}
    assert answer["timings"] == {"queue_s": 0.25, "ttft_s": 0.5, "total_s": 1.5}


async def test_an_absent_seed_is_drawn_told_and_used() -> None:
    door = Door()
    first, second = (await door.generate()).json(), (await door.generate()).json()
    assert first["seed"] == door.broker.requests[0].sampling.seed != second["seed"]
    assert first["seed"] < 2**53


async def test_choices_have_ids_seeds_and_one_prompt_count() -> None:
    door = Door(say("abc", LENGTH))
    answer = (await door.generate(n=3, seed=5)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.id for request in door.broker.requests] == [f"{answer['id']}.{i}" for i in range(3)]
    assert [request.sampling.seed for request in door.broker.requests] == [child_seed(5, i) for i in range(3)]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11, "cached_tokens": 0}
    assert door.books() == {"accepted": 3, "in_flight": 0, "length": 3}


async def test_what_was_found_in_the_cache_is_told_and_the_salt_reaches_the_request() -> None:
    found = {"one.0": 16, "one.1": 32}
    door = Door(lambda request: say("abc", num_cached=found["one" + request.id[-2:]])(request))
    answer = (await door.generate([1] * 40, n=2, cache_salt="s")).json()
    assert answer["usage"]["cached_tokens"] == 16  # the second found what the first had computed
    assert [request.cache_salt for request in door.broker.requests] == ["s", "s"]
    assert (await door.generate(cache_salt="")).status_code == 422


async def test_log_probabilities_in_the_completions_shape() -> None:
    a, b, c = TOKENIZER.encode("abc")
    told = (TokenLogprob(-0.5, ((a, -0.5), (b, -1.5))), TokenLogprob(-9.0, ((a, -0.5), (b, float("-inf")))))
    door = Door(lambda request: [Entry(0, (a, c), told, STOP)])
    (choice,) = (await door.generate(logprobs=2, echo=True)).json()["choices"]
    assert choice["text"] == "hiac"
    assert choice["logprobs"] == {
        "tokens": ["a", "c"],
        "token_logprobs": [-0.5, -9.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"a": -0.5, "b": None, "c": -9.0}],
        "text_offset": [2, 3],
    }


async def test_held_back_text_comes_with_the_end() -> None:
    door = Door(say("ab\n", LENGTH))
    answer = (await door.generate(stop="\n\n")).json()
    assert answer["choices"][0]["text"] == "ab\n"


@pytest.mark.parametrize("reason", [FinishReason.TIMEOUT, FinishReason.CANCELLED])
async def test_an_early_end_says_which_and_keeps_the_text(reason: FinishReason) -> None:
    door = Door(lambda request: [Entry(0, (65,)), Entry(1, finish=Finish(reason))])
    (choice,) = (await door.generate()).json()["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == (reason.value, 1)
    assert door.books() == {"accepted": 1, "in_flight": 0, reason.value: 1}


@pytest.mark.parametrize(
    "broken", [Entry(0, finish=Finish(FinishReason.ERROR, error="the engine failed")), RuntimeError("a secret path")]
)
async def test_a_failure_is_a_problem_that_tells_no_secret(broken: Entry | Exception) -> None:
    door = Door(lambda request: [broken])
    response = await door.generate()
    assert response.status_code == 500
    assert response.json()["detail"] in ("the engine failed", "internal error")
    assert door.books() == {"accepted": 1, "in_flight": 0, "error": 1}


async def test_one_lost_choice_leaves_the_others() -> None:
    lost = Finish(FinishReason.ERROR, error="lost")
    door = Door(lambda request: [Entry(0, (65,), finish=lost if request.id.endswith(".1") else STOP)])
    answer = (await door.generate(n=2)).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "error"]
    assert "error" not in answer


async def test_a_full_queue_refuses_before_tokenising() -> None:
    door = Door()
    door.broker.full = True
    response = await door.generate([999])  # would be 422
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    told = response.json()
    assert (told["num_waiting"], told["position"], told["retry_after_s"]) == (7, 8, 3)


@pytest.mark.parametrize(("refusal", "status"), [(Overloaded(9, 50), 429), (Unavailable("draining", 9), 503)])
async def test_a_refused_submission_is_a_status_even_for_a_stream(refusal: Exception, status: int) -> None:
    door = Door()
    door.broker.refusal = refusal
    response = await door.generate(stream=True)
    assert (response.status_code, response.headers["retry-after"]) == (status, "9")
    assert door.books() == {"accepted": 0, "in_flight": 0}
    reason = "overloaded" if status == 429 else "unavailable"
    assert door.metrics.registry.get_sample_value("millrace_requests_refused_total", {"reason": reason}) == 1


@pytest.mark.parametrize("num_tokens", [0, 1])
async def test_a_client_that_leaves_has_stopped_its_generation(num_tokens: int) -> None:
    door = Door(hang(*[Entry(i, (65,)) for i in range(num_tokens)]))
    visitor = Visitor(door.app, n=2)
    visit = asyncio.create_task(visitor.visit())
    await door.broker.waiting.wait()
    assert door.books()["in_flight"] == 2
    visitor.leave()
    await visit
    assert door.broker.cancelled == [request.id for request in door.broker.requests]
    assert door.books() == {"accepted": 2, "in_flight": 0, "cancelled": 2}


async def test_what_is_for_later_has_nobody_to_stream_to() -> None:
    response = await Door().generate(background=True, stream=True)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "background")


@pytest.mark.parametrize("max_tokens, num_left", [(10, 54), (1000, 32)])
async def test_a_prompt_that_fills_the_context_may_lose_its_beginning(max_tokens: int, num_left: int) -> None:
    door = Door()
    assert (await door.generate("a" * 80)).status_code == 422
    cut = await door.generate("a" * 80 + "b", on_overflow="truncate_left", max_tokens=max_tokens)
    assert cut.status_code == 200
    (request,) = door.broker.requests
    assert TOKENIZER.decode(request.prompt_ids) == "a" * (num_left - 1) + "b"
    assert request.sampling.max_tokens == 64 - num_left
