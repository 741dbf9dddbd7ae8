"""Chat templates: a conversation to one text. It knows Jinja and its sandbox, and no tokens."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import cast

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.config import CheckpointError

MAX_CHAT_CHARS = 8_000_000  # of rendered text: a loop gone wild must not fill the memory


class ChatTemplateError(ValueError):
    """A conversation that the chat template refuses or can't render: the cause in one short line."""


class ChatTemplates:
    """Compiled templates by name, run in a sandbox: they come with a checkpoint, which somebody else made.

    What a template may use is what Hugging Face promises its authors (transformers, `utils/chat_template_utils.py`).
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        """Raises `CheckpointError` for what is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except TemplateError as error:
            raise CheckpointError(f"chat template: expected a Jinja template, found: {one_line(error)}") from error

    def __bool__(self) -> bool:
        return "default" in self._templates

    def render(self, variables: Mapping[str, object]) -> str:
        """The text, by the template `tool_use` if there is one and there are tools. Raises `ChatTemplateError`."""
        name = "tool_use" if variables.get("tools") and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise ChatTemplateError("the model has no chat template")
        parts, num_chars = [], 0
        try:
            for part in template.generate(variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_CHAT_CHARS:
                    raise TemplateError(f"it writes more than {MAX_CHAT_CHARS} characters")
        except Exception as error:  # a template is a program: it can fail in any way
            raise ChatTemplateError(f"the chat template fails: {one_line(error)}") from error
        return "".join(parts)


def templates_of(config: Mapping[str, object]) -> dict[str, str]:
    """The templates in a tokenizer_config.json: one, or a list of `{"name", "template"}`. Raises `CheckpointError`."""
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        return {str(item["name"]): str(item["template"]) for item in cast(list[dict[str, object]], found)}
    except (TypeError, KeyError):
        raise CheckpointError(
            "tokenizer_config.json: chat_template: expected a string or a list of name and template, "
            f"found {type(found).__name__}"
        ) from None


def one_line(error: Exception, limit: int = 200) -> str:
    """What an error says, in one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _GenerationBlock(Extension):
    """`{% generation %}` marks what to train on (a Hugging Face extension). Serving takes its contents as they are."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
