"""LangChain's classes for OpenAI."""

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from tries import BASE_URL, MODEL, TOOL, run

chat = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key="none", max_tokens=40)
formal = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key="none", max_tokens=400)  # to end what it begins


class Seen(BaseModel):
    """What was seen."""

    count: int = Field(ge=1, le=9)
    is_red: bool


def stream():
    parts = list(chat.stream("Tell me a story.", stream_usage=True))
    return "".join(part.content for part in parts) and any(part.usage_metadata for part in parts)


def tools():
    answer = formal.bind_tools([TOOL], tool_choice="look").invoke("Look at a fox.")
    return answer.tool_calls[0]["args"]["animal"]


run(
    invoke=lambda: chat.invoke("Tell me a story.").content,
    stream=stream,
    batch=lambda: all(answer.content for answer in chat.batch(["Tell me a story.", "The fox"])),
    completion=lambda: OpenAI(model=MODEL, base_url=BASE_URL, api_key="none", max_tokens=9).invoke("Once upon"),
    structured_by_schema=lambda: formal.with_structured_output(Seen, method="json_schema").invoke("A fox.").count,
    structured_by_call=lambda: formal.with_structured_output(Seen, method="function_calling").invoke("A fox.").count,
    tools=tools,
)
