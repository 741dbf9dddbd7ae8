"""OpenAI's Python client: every route that it and this server both have."""

import json

import openai
from pydantic import BaseModel
from tries import ASK, BASE_URL, MODEL, TOOL, run

client = openai.OpenAI(base_url=BASE_URL, api_key="none")


class Seen(BaseModel):
    animal: str
    count: int


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20)
    return answer.choices[0].message.content and answer.usage.completion_tokens == 20


def stream():
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20, stream=True, stream_options=options)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text and chunks[-1].usage.completion_tokens == 20


def completions():
    answer = client.completions.create(model=MODEL, prompt=["Once upon", "The fox"], max_tokens=5, logprobs=1)
    chunks = list(client.completions.create(model=MODEL, prompt="Once", max_tokens=5, stream=True))
    return len(answer.choices) == 2 and chunks[-1].choices[0].finish_reason == "length"


def models():
    return client.models.retrieve(client.models.list().data[0].id).id == MODEL


def tools():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required", seed=1)
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    turns = [*ASK, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "a den"}]
    after = client.chat.completions.create(model=MODEL, messages=turns, tools=[TOOL], max_tokens=5)
    return arguments["animal"] and after.choices[0].message.content


def parse():
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=schema_of(Seen))
    return json.loads(answer.choices[0].message.content)["count"] in (1, 2, 3)


def schema_of(kind):
    return {"type": "json_schema", "json_schema": {"name": kind.__name__, "schema": TOOL["function"]["parameters"]}}


def responses():
    answer = client.responses.create(model=MODEL, input="Tell me a story.", max_output_tokens=20)
    events = list(client.responses.create(model=MODEL, input="Tell me.", max_output_tokens=20, stream=True))
    return answer.output_text and events[0].type == "response.created"


def errors():
    try:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=9)
    except openai.BadRequestError as error:
        return error.param == "temperature"
    return False


run(
    chat=chat,
    stream=stream,
    completions=completions,
    models=models,
    tools=tools,
    structured=parse,
    responses=responses,
    errors=errors,
)
