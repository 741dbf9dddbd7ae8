"""LiteLLM, with the three prefixes that fit."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # before the import, which would ask the network

import litellm
from tries import ASK, BASE_URL, MODEL, TOOL, run

WHERE = {"api_base": BASE_URL, "api_key": "none"}


def chat(prefix):
    answer = litellm.completion(model=f"{prefix}/{MODEL}", messages=ASK, max_tokens=20, **WHERE)
    return answer.choices[0].message.content and answer.usage.completion_tokens == 20


def stream():
    options = {"include_usage": True}
    chunks = list(
        litellm.completion(
            model=f"hosted_vllm/{MODEL}", messages=ASK, max_tokens=20, stream=True, stream_options=options, **WHERE
        )
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def tools():
    answer = litellm.completion(model=f"openai/{MODEL}", messages=ASK, tools=[TOOL], tool_choice="required", **WHERE)
    return answer.choices[0].message.tool_calls[0].function.name == "look"


def text():
    answer = litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="Once", max_tokens=9, **WHERE)
    return answer.choices[0].text


run(
    openai=lambda: chat("openai"),
    hosted_vllm=lambda: chat("hosted_vllm"),
    stream=stream,
    text_completion=text,
    tools=tools,
)
