import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.assemble import Assembler, assemble
from model.request import Request, SamplingParams, TextOptions
from model.tokenizer import Tokenizer
from tests.model.helpers_tokenizer import byte_fallback, byte_level

KINDS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
kinds = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS.keys())
BYTES = KINDS["byte level"]
OF_BYTE = {BYTES.token_bytes(i): i for i in range(BYTES.vocab_size)}


def ids_of(text: str) -> list[int]:
    """One id for each byte, so that a test decides what a token is."""
    return [OF_BYTE[bytes([byte])] for byte in text.encode()]


def asked(
    prompt: str = "", *stop: str, min_tokens: int = 0, stop_ids: tuple[int, ...] = (), echo: bool = False
) -> Request:
    sampling = SamplingParams(min_tokens=min_tokens, stop_token_ids=stop_ids)
    return Request("r", tuple(ids_of(prompt)), sampling, TextOptions(stop, echo))


def pieces(request: Request, text: str) -> list[str]:
    assembler = Assembler(BYTES, request)
    return [assembler.push(i) for i in ids_of(text)] + [assembler.finish()]


def slow_twin(tokenizer: Tokenizer, request: Request, ids: list[int]) -> str:
    """The definition, one character at a time: end the text at the first one that completes a stop string."""
    detokenizer = tokenizer.detokenizer(request.prompt_ids)
    parts = [detokenizer.push(i) for i in ids]
    parts.append(detokenizer.flush())
    text = ""
    for num_tokens, part in enumerate(parts, start=1):
        for char in part:
            text += char
            hits = [stop for stop in request.text.stop if text.endswith(stop)]
            if hits and min(num_tokens, len(ids)) >= request.sampling.min_tokens:
                return text[: len(text) - len(max(hits, key=len))]
    return text


@kinds
@given(data=st.data())
def test_text_is_cut_before_the_first_stop_string_whatever_the_tokens(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    letters = st.sampled_from([*"then a", "€", "\ufffd"])
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4)
    parts = st.one_of(st.text(letters, max_size=6).map(lambda text: tokenizer.encode(text, special=False)), some_ids)
    ids = [i for part in data.draw(st.lists(parts, max_size=4)) for i in part]
    stop = data.draw(st.lists(st.text(letters, min_size=1, max_size=4), max_size=3))
    request = Request(
        "r",
        tuple(data.draw(some_ids)),
        SamplingParams(min_tokens=data.draw(st.integers(0, 6))),
        TextOptions(tuple(stop)),
    )
    text, stopped = assemble(tokenizer, request, ids)
    assert text == slow_twin(tokenizer, request, ids)
    for end in range(len(ids)):
        assert text.startswith(assemble(tokenizer, request, ids[:end], finished=False)[0]), "shown and then taken back"
    assert stopped is None or stopped in stop


@kinds
@given(prompt=st.lists(st.integers(0, 340), max_size=5), ids=st.lists(st.integers(0, 340), max_size=9))
def test_an_echo_and_the_text_are_the_decoded_whole(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    echoed = Request("r", tuple(prompt), text=TextOptions(echo=True))
    assert assemble(tokenizer, echoed, ids)[0] == tokenizer.decode(prompt + ids)
    assert Assembler(tokenizer, echoed).opening + assemble(tokenizer, Request("r", tuple(prompt)), ids)[0] == (
        tokenizer.decode(prompt + ids)
    )


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assert pieces(asked("", "END"), "aEEND") == ["a", "", "E", "", "", ""]
    assert pieces(asked("", "END"), "aENb") == ["a", "", "", "ENb", ""]
    assert pieces(asked("", "END"), "aEN") == ["a", "", "", "EN"]


def test_nothing_comes_after_a_stop_string() -> None:
    assembler = Assembler(BYTES, asked("", "."))
    assert "".join(assembler.push(i) for i in ids_of("one. two.")) + assembler.finish() == "one"
    assert assembler.stopped == "."


def test_a_resumed_reader_gets_the_same_pieces() -> None:
    request, text = asked("le ", "fin\n"), "été fin fi€n\nfin\n"
    whole = pieces(request, text)
    for taken in range(len(text)):
        again = Assembler(BYTES, request)
        assert [again.push(i) for i in ids_of(text)[:taken]] == whole[:taken]


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        (("abcd", "bc"), "xa", "bc"),  # complete first
        (("c", "bc", "abc"), "x", "abc"),  # complete together: the longest
        (("zz",), "xabcd", None),
    ],
)
def test_which_stop_string_wins(stop: tuple[str, ...], text: str, stopped: str | None) -> None:
    assert assemble(BYTES, asked("", *stop), ids_of("xabcd")) == (text, stopped)


def test_a_stop_string_is_not_sought_in_the_prompt() -> None:
    assert assemble(BYTES, asked("one.", ".", echo=True), ids_of("two.")) == ("one.two", ".")
    assert assemble(BYTES, asked("a", "ab", echo=True), ids_of("b")) == ("ab", None)


def test_a_stop_string_counts_from_the_token_that_reaches_min_tokens() -> None:
    assert assemble(BYTES, asked("", "ab", min_tokens=2), ids_of("abab")) == ("", "ab")
    assert assemble(BYTES, asked("", "ab", min_tokens=3), ids_of("abab")) == ("ab", "ab")
    assert assemble(BYTES, asked("", "ab", min_tokens=5), ids_of("abab")) == ("abab", None)
    assert assemble(BYTES, asked("", "b", "abc", min_tokens=3), ids_of("abx")) == ("abx", None)


def test_a_stop_id_has_no_text_and_lets_go_of_what_was_held() -> None:
    (comma,) = ids_of(",")
    assert pieces(asked("", "END", stop_ids=(comma,)), "aE,bc") == ["a", "", "", "", "", "E"]
    assert assemble(BYTES, asked("", min_tokens=2, stop_ids=(comma,)), ids_of("a,b,c")) == ("a,b", None)


def test_an_unfinished_character_is_told_at_the_end() -> None:
    assembler = Assembler(BYTES, asked())
    assert [assembler.push(i) for i in ids_of("€")[:2]] == ["", ""]
    assert (assembler.finish(), assembler.finish()) == ("\ufffd", "")
