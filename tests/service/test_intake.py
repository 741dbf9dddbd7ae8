"""From a checked body to frozen requests."""

import time
from dataclasses import replace
from typing import Any

import pytest

from model.request import SamplingParams
from service.errors import InvalidRequest, MillraceError, ModelNotFound, PromptTooLong
from service.http.intake import MAX_INLINE_CHARS, Asked, Intake, take_in
from service.http.schemas import GenerateRequest
from tests.service.helpers_http import SERVED, TOKENIZER


async def intake(**fields: Any) -> Intake:
    return await take_in(Asked(GenerateRequest.model_validate({"prompt": "hi"} | fields)), SERVED)


async def test_a_bare_prompt_gets_the_models_defaults() -> None:
    taken = await intake(seed=1)
    (request,) = taken.group
    assert request.sampling == SamplingParams(temperature=0.5, seed=1, max_tokens=62, stop_token_ids=(0,), eos_ids=(0,))
    assert (request.id, request.model, request.num_choices) == (taken.id, "tiny", 1)
    assert request.prompt_ids == tuple(TOKENIZER.encode("hi"))


async def test_what_is_given_wins_over_the_defaults() -> None:
    given = {"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 2}
    (request,) = (await intake(**given)).group
    assert {name: getattr(request.sampling, name) for name in given} == given


async def test_every_other_setting_arrives() -> None:
    fields: dict[str, Any] = {"presence_penalty": 1, "frequency_penalty": -1, "min_tokens": 2, "priority": -1}
    taken = await intake(**fields, logit_bias={"7": 5}, logprobs=0, stop="x", echo=True, max_tokens=9)
    (request,) = taken.group
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.min_tokens) == (1, -1, 2)
    assert (sampling.logit_bias, sampling.num_logprobs, sampling.max_tokens) == (((7, 5.0),), 0, 9)
    assert (request.text.stop, request.text.echo, request.priority) == (("x",), True, -1)


async def test_stop_ids_are_the_models_and_the_clients() -> None:
    (request,) = (await intake(stop_token_ids=[9, 0, 9])).group
    assert (request.sampling.stop_token_ids, request.sampling.eos_ids) == ((0, 9), (0,))
    (request,) = (await intake(stop_token_ids=[9], ignore_eos=True)).group
    assert (request.sampling.stop_token_ids, request.sampling.eos_ids) == ((9,), ())


async def test_the_deadline_is_on_the_wall_clock() -> None:
    (request,) = (await intake(timeout_s=50)).group
    assert (request.deadline_s, request.queue_deadline_s) == (request.created_s + 50, None)
    assert abs(time.time() - request.created_s) < 5
    (request,) = (await intake(queue_timeout_s=7)).group
    assert request.queue_deadline_s == request.created_s + 7


async def test_a_request_that_names_no_time_gets_the_servers() -> None:
    (request,) = (await intake()).group
    assert request.deadline_s == request.created_s + 3600
    body = GenerateRequest(prompt="hi")
    (request,) = (await take_in(Asked(body), replace(SERVED, max_request_s=20.0))).group
    assert request.deadline_s == request.created_s + 20


@pytest.mark.parametrize("fields", [{}, {"resumable": True}])
async def test_what_needs_a_reader_is_given_up_without_one(fields: dict[str, Any]) -> None:
    taken = await take_in(Asked(GenerateRequest(prompt="hi", n=2, **fields)), replace(SERVED, orphan_s=5.0))
    assert [request.orphan_s for request in taken.group] == [5.0, 5.0]


async def test_what_is_asked_for_in_the_background_needs_no_reader() -> None:
    (request,) = (await intake(background=True)).group
    assert request.orphan_s is None


async def test_a_group_says_of_itself_what_its_answers_say() -> None:
    taken = await intake(n=2, seed=5)
    assert [request.id for request in taken.group] == [f"{taken.id}.0", f"{taken.id}.1"]
    assert (taken.model, taken.seed, taken.created) == ("tiny", 5, int(taken.group[0].created_s))
    assert [request.num_choices for request in taken.group] == [2, 2]


@pytest.mark.parametrize(("num_prompt", "wanted", "granted"), [(10, 5, 5), (10, 500, 54), (63, 500, 1)])
async def test_max_tokens_ends_where_the_context_does(num_prompt: int, wanted: int, granted: int) -> None:
    (request,) = (await intake(prompt=[5] * num_prompt, max_tokens=wanted)).group
    assert request.sampling.max_tokens == granted


@pytest.mark.parametrize("prompt", [[5] * 64, "a" * 64, "a" * (MAX_INLINE_CHARS + 1)])
async def test_an_overlong_prompt_is_told_in_numbers(prompt: Any) -> None:
    with pytest.raises(PromptTooLong) as refusal:
        await intake(prompt=prompt)
    assert (refusal.value.num_prompt_tokens, refusal.value.limit) == (len(prompt), 63)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": [256]}, "prompt"),
        ({"stop_token_ids": [256]}, "stop_token_ids"),
        ({"logit_bias": {"256": 1}}, "logit_bias"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ],
)
async def test_what_only_the_model_can_tell_is_checked_here(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await intake(**fields)
    assert refusal.value.field == field


async def test_a_model_without_blocks_to_share_does_not_search() -> None:
    body = GenerateRequest(prompt="hi", beam_width=2)
    assert (await take_in(Asked(body), SERVED)).group[0].sampling.beam_width == 2
    with pytest.raises(InvalidRequest, match="beam_width"):
        await take_in(Asked(body), replace(SERVED, searches=False))


async def test_text_that_makes_no_token_is_refused() -> None:
    class Mute(type(TOKENIZER)):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def encode(self, text: str, *, special: bool = True) -> list[int]:
            return []

    with pytest.raises(InvalidRequest):
        await take_in(Asked(GenerateRequest(prompt="hi")), replace(SERVED, tokenizer=Mute()))


async def test_another_models_name_is_refused() -> None:
    with pytest.raises(ModelNotFound):
        await intake(model="other")
    assert issubclass(ModelNotFound, MillraceError)
