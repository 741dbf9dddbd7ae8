"""Chat templates: a conversation to one text. It knows Jinja and its sandbox, and no tokens.

A template is a program that came with a model, so it is held to a time and a size. Jinja has neither; so every step of
a loop and every call looks at the clock, and whatever can make a value much larger than what it is made of is weighed
before or as soon as it is done.
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from string import Formatter
from typing import Any, cast

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.nodes import Concat, Filter, For, Node, Template
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.config import CheckpointError

MAX_CHAT_CHARS = 8_000_000  # of rendered text, and of any value on the way to it
MAX_CHAT_S = 1.0
MAX_GROWTH = 2**28  # of one value made of several: the product of their sizes
MAX_BITS, MAX_POWER = 1024, 64  # of an integer
WIDE = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*([0-9]{4}|\*)")  # a width behind a percent sign, or one given beside
WIDE_FIELD = re.compile(r"[0-9]{4}|\{")  # the same behind a field's colon

_until_s = ContextVar("until_s", default=math.inf)  # monotonic seconds; of the rendering in this thread or task


class ChatTemplateError(ValueError):
    """A conversation that the chat template refuses or can't render: the cause in one short line."""


class ChatTemplates:
    """Compiled templates by name, run in a sandbox: they come with a checkpoint, which somebody else made.

    What a template may use is what Hugging Face promises its authors (transformers, `utils/chat_template_utils.py`).
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        """Raises `CheckpointError` for what is no template."""
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        for name in ("join", "replace", "center", "indent", "wordwrap", "batch", "slice"):
            environment.filters[name] = _weighed(environment.filters[name])
        environment.filters |= {"format": _format, _STEPS: _steps, _BOUNDED: _bounded}
        del environment.globals["lipsum"]
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
        parts, num_chars, before = [], 0, _until_s.set(time.monotonic() + MAX_CHAT_S)
        try:
            for part in template.generate(variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_CHAT_CHARS:
                    raise TemplateError(f"it writes more than {MAX_CHAT_CHARS} characters")
        except Exception as error:  # a template is a program: it can fail in any way
            raise ChatTemplateError(f"the chat template fails: {one_line(error)}") from error
        finally:
            _until_s.reset(before)
        return "".join(parts)


_STEPS, _BOUNDED = " steps", " bounded"  # names that no template can write


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own, which keeps a template from what it should not reach, with an eye on what it costs."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(For)):
            loop.iter = Filter(loop.iter, _STEPS, [], [], None, None, lineno=loop.lineno)
        for text in list(tree.find_all(Concat)):
            text.nodes = [Filter(Concat(text.nodes, lineno=text.lineno), _BOUNDED, [], [], None, None)]
        tree.set_environment(self)
        return tree

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # what a block or a macro wrote
        told = list(parts)
        if sum(map(len, told)) > MAX_CHAT_CHARS:
            raise TemplateError(f"it makes a text of more than {MAX_CHAT_CHARS} characters")
        return "".join(told)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        _look_at_the_clock()
        owner = getattr(callee, "__self__", None)
        if isinstance(owner, str):
            _weigh(owner, *args, *kwargs.values())
        return super().call(context, callee, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, whose sandboxed form no longer knows what text it is of."""
        wrapped = super().wrap_str_format(value)
        fields = [] if wrapped is None else Formatter().parse(value.__self__)
        if any(WIDE_FIELD.search(form or "") for _, _, form, _ in fields):
            raise TemplateError("a format may not be that wide")
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that make much of little."""
        if operator == "**" and _size(right) > MAX_POWER:
            raise TemplateError(f"a power may be {MAX_POWER} at most")
        if operator == "%" and isinstance(left, str):
            _check_form(left)
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            _weigh(left, right)
        return _bounded(super().call_binop(context, operator, left, right))


def _look_at_the_clock() -> None:
    if time.monotonic() > _until_s.get():
        raise TemplateError(f"it takes more than {MAX_CHAT_S:.0f} s")


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through."""
    for value in values:
        _look_at_the_clock()
        yield value


def _bounded(value: Any) -> Any:
    """The value, if it may be that large."""
    large = value.bit_length() > MAX_BITS if isinstance(value, int) else _size(value) > MAX_CHAT_CHARS
    if large:
        raise TemplateError(f"it makes a {type(value).__name__} that is too large")
    return value


def _weighed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that weighs what it is given. Some are told of the environment first, which weighs nothing."""

    def weighed(*args: Any, **kwargs: Any) -> Any:
        _weigh(*args, *kwargs.values())
        return _bounded(function(*args, **kwargs))

    return functools.update_wrapper(weighed, function)


def _check_form(form: str) -> None:
    """What stands left of a `%`: it may name a width."""
    if WIDE.search(form):
        raise TemplateError("a format may not be that wide")


def _format(form: str, *args: Any, **kwargs: Any) -> str:
    _check_form(form)
    return do_format(form, *args, **kwargs)


def _weigh(*values: object) -> None:
    if math.prod(max(1, _size(value)) for value in values) > MAX_GROWTH:
        raise TemplateError("it makes a value that is too large")


def _size(value: object) -> int:
    """Of a text or list its length, what is in the list included once; a number may be a width or a count."""
    match value:
        case str():
            return len(value)
        case list() | tuple():
            return len(value) + sum(len(each) for each in value if isinstance(each, str))
        case int():
            return abs(value)
    return 1


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
