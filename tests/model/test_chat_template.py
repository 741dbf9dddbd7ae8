"""A chat template comes from whoever made the model: it may write a conversation, and neither reach nor cost anything
else."""

import time
import tracemalloc

import pytest

from model.chat_template import MAX_CHAT_CHARS, MAX_CHAT_S, ChatTemplateError, ChatTemplates

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
DOUBLED = "{{% set n = namespace(x={}) %}}{{% for i in range(60) %}}{{% set n.x = {} %}}{{% endfor %}}{{{{ n.x }}}}"


def render(source: str) -> str:
    return ChatTemplates({"default": source}).render({"messages": MESSAGES})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}", "1/2,2/2"),
        ("{% for m in messages if m.role == 'user' %}{{ m.role ~ ': ' ~ m['content'] }}{% endfor %}", "user: hi"),
        ("{% for m in none or [] %}{% else %}none{% endfor %}", "none"),
        ("{% for m in nowhere %}{% else %}none{% endfor %}", "none"),
        ("{% for m in messages %}{{ loop.previtem.role if loop.previtem }}{% endfor %}", "user"),
        ("{% for x in [[1, 2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "12"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') + f('b') }}", "[a][b]"),
        ("{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i * 2 }}", "4"),
        ("{% set x %}{{ messages[0].content }}!{% endset %}{{ x }}", "hi!"),
        (
            "{{ messages | map(attribute='role') | join(' ') }} {{ 'a-b'.split('-') | last | upper }}",
            "user assistant B",
        ),
        ("{{ '%s=%.2f' % ('a', 1) }} {{ '%02d' | format(3) }} {{ '{:>3}'.format(1) }} {{ 7 % 2 }}", "a=1.00 03   1 1"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
    ],
)
def test_what_templates_do_they_may_do(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for x in [1, 1] recursive %}{% if loop.depth < 40 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    ],
)
def test_what_would_never_end_is_ended(source: str) -> None:
    begun_s = time.thread_time()
    with pytest.raises(ChatTemplateError, match="more than 1 s"):
        render(source)
    assert time.thread_time() - begun_s < 3 * MAX_CHAT_S


@pytest.mark.parametrize(
    "source",
    [
        "{{ 10 ** 100000000 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        DOUBLED.format("'ab'", "n.x ~ n.x"),
        DOUBLED.format("'ab'", "n.x + n.x"),
        DOUBLED.format("3", "n.x * n.x"),
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
        "{% set n.x = y %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ '{0:>{1[w]}}'.format(1, {'w': 1000000000}) }}",
        "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
        "{{ '%(x)1000000000d' % {'x': 1} }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a\n' * 1000 | indent(100000000) }}",
        "{{ ('a' * 10000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 10000) | replace('a', 'b' * 100000) }}",
        "{{ (['b' * 1000000] * 1000) | join('') }}",
        "{{ ''.join(['b' * 1000000] * 1000) }}",
        "{{ range(10000000) }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_what_would_fill_the_memory_is_refused(source: str) -> None:
    begun_s = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 16 * MAX_CHAT_CHARS, "it was made before it was refused"
    finally:
        tracemalloc.stop()
    assert time.thread_time() - begun_s < 3 * MAX_CHAT_S


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'In {:>6} of 2026'.format(1) }}",
        "{{ 'In %6d of 2026' % 1 }}",
        "{{ 'In {x:6} of 2026'.format_map({'x': 1}) }}",
    ],
)
def test_what_a_format_says_beside_its_widths_is_its_own_affair(source: str) -> None:
    assert render(source) == "In      1 of 2026"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{{ ''['__class__'] ~ (''|attr('__class__')).x }}",
        "{{ '{0.__class__.__mro__}'.format('') ~ raise_exception('not reached') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_nothing_but_the_conversation_can_be_reached(source: str) -> None:
    try:
        assert render(source) in ("", "None")
    except ChatTemplateError as error:
        assert "not reached" not in str(error)
