"""Instructor: objects out of a model, in the modes that a server has to help with."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field
from tries import BASE_URL, MODEL, run


class Seen(BaseModel):
    """What was seen."""

    count: int = Field(ge=1, le=9)
    is_red: bool


def ask(mode):
    client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key="none"), mode=mode)
    turns = [{"role": "user", "content": "A fox."}]
    return client.chat.completions.create(model=MODEL, messages=turns, response_model=Seen, max_retries=0).count >= 1


run(
    TOOLS=lambda: ask(instructor.Mode.TOOLS),
    JSON_SCHEMA=lambda: ask(instructor.Mode.JSON_SCHEMA),
    TOOLS_STRICT=lambda: ask(instructor.Mode.TOOLS_STRICT),
)
