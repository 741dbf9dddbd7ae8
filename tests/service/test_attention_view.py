"""`/attention`: on only where it was asked for, small, behind the queue of its own thread."""

import asyncio
import threading

import pytest

from service.cli import STARTUP_FAILED, main
from tests.service.helpers_http import TOKENIZER, Door

ROUTE = "/attention"


def look(ids: list[int]) -> list[list[list[float]]]:
    return [[[1.0 if i == layer + head else 0.0 for i in range(len(ids))] for head in range(2)] for layer in range(3)]


def door() -> Door:
    made = Door()
    made.backend.look = look
    return made


async def test_the_last_tokens_weights_come_by_layer_and_head() -> None:
    answer = await door().ask("POST", ROUTE, json={"token_ids": TOKENIZER.encode("Hi!")})
    assert answer.json() == {"tokens": ["H", "i", "!"], "weights": look([1, 2, 3])}


async def test_a_server_without_the_view_has_no_such_thing() -> None:
    refused = await Door().ask("POST", ROUTE, json={"token_ids": [1]})
    assert refused.status_code == 404 and "--attention-view" in refused.text


@pytest.mark.parametrize("ids", [[], [1] * 513, [256], ["a"], "text"])
async def test_other_ids_are_refused(ids: object) -> None:
    refused = await door().ask("POST", ROUTE, json={"token_ids": ids})
    assert refused.status_code == 422 and "token_ids" in refused.text


async def test_only_a_few_may_wait() -> None:
    made, go = Door(), threading.Event()

    def slowly(ids: list[int]) -> list[list[list[float]]]:
        go.wait()
        return look(ids)

    made.backend.look = slowly
    asked = [asyncio.create_task(made.ask("POST", ROUTE, json={"token_ids": [1]})) for _ in range(9)]
    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert {task.result().status_code for task in done} == {429}
    go.set()
    codes = [(await task).status_code for task in asked]
    assert sorted(codes) == [200] * 4 + [429] * 5


def test_it_needs_the_weights_in_the_same_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--attention-view", "--redis-url", "redis://127.0.0.1:1/0"])
    assert ended.value.code == STARTUP_FAILED and "--attention-view" in capsys.readouterr().err
