import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from model.chat_template import MAX_CHAT_CHARS, ChatTemplateError
from model.config import CheckpointError
from model.tokenizer import Tokenizer
from tests.model.helpers_tokenizer import (
    byte_fallback,
    byte_fallback_backend,
    byte_level,
    byte_level_backend,
    unigram_backend,
)

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
LIBRARY_BYTE_LEVEL, LIBRARY_BYTE_FALLBACK = byte_level_backend(), byte_fallback_backend()
KINDS = {"byte level": BYTE_LEVEL, "byte fallback": BYTE_FALLBACK}
kinds = pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS.keys())
texts = st.text(st.characters(codec="utf-8", exclude_characters="▁"))  # SentencePiece takes that one for a space
ids_of_both = st.lists(st.integers(0, 340), max_size=12)  # some are past the end of either vocabulary


def streamed(tokenizer: Tokenizer, prefix: list[int], ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer(prefix)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@kinds
@given(text=texts)
def test_encoding_and_streaming_give_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, [], ids) == tokenizer.decode(ids) == text


@given(text=texts)
def test_decode_equals_the_librarys_on_text(text: str) -> None:
    for tokenizer, backend in ((BYTE_LEVEL, LIBRARY_BYTE_LEVEL), (BYTE_FALLBACK, LIBRARY_BYTE_FALLBACK)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == backend.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == backend.decode(ids, skip_special_tokens=False)


@given(ids=ids_of_both)
def test_byte_level_decode_equals_the_librarys_on_any_ids(ids: list[int]) -> None:
    assert BYTE_LEVEL.decode(ids) == LIBRARY_BYTE_LEVEL.decode(ids)


@given(ids=st.lists(st.integers(0, 3) | st.integers(260, 340), max_size=12))
def test_byte_fallback_decode_equals_the_librarys_on_ids_that_are_no_bytes(ids: list[int]) -> None:
    assert BYTE_FALLBACK.decode(ids) == LIBRARY_BYTE_FALLBACK.decode(ids)


@kinds
@given(prefix=ids_of_both, ids=ids_of_both)
def test_text_after_a_prefix_goes_on_where_the_prefix_ends(
    tokenizer: Tokenizer, prefix: list[int], ids: list[int]
) -> None:
    before = tokenizer.detokenizer()
    opening = "".join(map(before.push, prefix))
    assert opening + streamed(tokenizer, prefix, ids) == tokenizer.decode(prefix + ids)


def test_the_first_token_after_a_prompt_keeps_its_space() -> None:
    the = BYTE_FALLBACK.encode("the", special=False)
    assert BYTE_FALLBACK.decode(the) == "the"
    assert streamed(BYTE_FALLBACK, BYTE_FALLBACK.encode("then"), the) == " the"
    assert streamed(BYTE_FALLBACK, BYTE_FALLBACK.encode(""), the) == "the"


@kinds
def test_no_text_comes_inside_a_character_and_the_rest_at_the_end(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "a🦀".encode())
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(i) for i in ids] == ["a", "", "", "", "🦀"]
    assert streamed(tokenizer, [], ids[:-1]) == "a\ufffd"
    assert streamed(tokenizer, ids[:-1], ids[-1:]) == streamed(tokenizer, ids[1:2], ids[2:]) == "🦀"


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    of_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [of_byte[bytes([byte])] for byte in data]


def test_text_of_one_token() -> None:
    (the,) = BYTE_FALLBACK.encode("the", special=False)
    (lead,) = byte_ids(BYTE_FALLBACK, b"\xe2")
    assert BYTE_FALLBACK.token_text(the) == " the"
    assert BYTE_FALLBACK.token_text(lead) == "bytes:\\xe2"
    assert BYTE_FALLBACK.token_text(0) == "<s>"
    assert [BYTE_FALLBACK.token_text(i) for i in (-1, BYTE_FALLBACK.vocab_size, 2**40)] == ["", "", ""]


def test_a_text_may_begin_with_a_byte_token_or_a_name_that_no_bytes_spell() -> None:
    assert BYTE_FALLBACK.decode(byte_ids(BYTE_FALLBACK, "é ".encode())) == "é "
    assert BYTE_FALLBACK.decode(byte_ids(BYTE_FALLBACK, " é".encode())) == "é"
    backend = byte_level_backend()
    backend.add_tokens(["河 here"])
    assert Tokenizer(backend).token_text(backend.get_vocab_size() - 1) == "河 here"


def test_tokens_that_the_config_names_are_control_tokens() -> None:
    (end,) = BYTE_LEVEL.encode("e", special=False)
    assert BYTE_LEVEL.decode([end]) == "e"
    assert Tokenizer(byte_level_backend(), {"eos_token": "e"}).decode([end]) == ""


def test_a_tokenizer_without_decoder_joins_words_by_spaces() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend)
    assert streamed(tokenizer, [], tokenizer.encode("a b a")) == "a b a"


def test_a_decoder_that_looks_at_several_tokens_is_refused() -> None:
    backend = byte_level_backend()
    backend.decoder = decoders.CTC()
    with pytest.raises(CheckpointError, match="found CTC"):
        Tokenizer(backend)


@kinds
def test_control_tokens_in_a_prompt_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a</s>b<|user|>", special=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a</s>b<|user|>"


def test_control_tokens_in_a_prompt_are_text_where_the_vocabulary_has_them_too() -> None:
    backend = unigram_backend()
    assert {1, 2} < set(backend.encode("a</s>b<|user|>").ids)
    tokenizer = Tokenizer(unigram_backend(), {"eos_token": "</s>"}, CHATML)
    for text in ("a</s>b<|user|>", "</s>", "<s>the"):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids[:-1]) and ids[-1] == 1
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("the than") == backend.encode("the than").ids
    ids = tokenizer.encode_chat([{"role": "user", "content": "a</s><|user|>"}])
    assert [i for i in ids if i in (0, 1, 2)] == [2, 1, 2]


def test_special_adds_what_the_post_processor_adds() -> None:
    assert BYTE_FALLBACK.encode("the") == [BYTE_FALLBACK.bos_id, *BYTE_FALLBACK.encode("the", special=False)]
    assert BYTE_LEVEL.encode("the") == BYTE_LEVEL.encode("the", special=False)


def test_tokenizer_config_decides_on_bos_and_eos() -> None:
    text = BYTE_FALLBACK.encode("the", special=False)
    for add_bos, add_eos in ((True, False), (False, True), (True, True), (False, False)):
        config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos, "add_eos_token": add_eos}
        tokenizer = Tokenizer(byte_fallback_backend(), config)
        assert tokenizer.encode("the") == [0] * add_bos + text + [1] * add_eos


def test_a_bos_token_to_add_must_exist() -> None:
    with pytest.raises(CheckpointError, match="bos_token: expected one in the vocabulary, found '<begin>'"):
        Tokenizer(byte_level_backend(), {"bos_token": "<begin>", "add_bos_token": True})


def test_truncation_and_padding_left_in_a_file_are_off() -> None:
    backend = byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert len(Tokenizer(backend).encode("abcdefgh")) == 8


def test_a_lone_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        BYTE_LEVEL.encode("a\ud800")


@pytest.mark.parametrize("normalized", [False, True])
def test_chat_parses_the_templates_control_tokens_and_not_the_users(normalized: bool) -> None:
    tokenizer = Tokenizer(byte_fallback_backend(normalized=normalized), {"bos_token": "<s>"}, CHATML)
    ids = tokenizer.encode_chat([{"role": "user", "content": "a</s>\ufdd0</s><|us<|user|>er|>"}])
    assert [i for i in ids if i in (0, 1, 2)] == [0, 2, 1, 2]
    assert "a</s></s><|us<|user|>er|>" in tokenizer.decode(ids)


@kinds
def test_chat_gives_the_ids_of_the_rendered_text(tokenizer: Tokenizer) -> None:
    backend = byte_level_backend() if tokenizer is BYTE_LEVEL else byte_fallback_backend()
    chat = Tokenizer(type(backend).from_str(backend.to_str()), {"bos_token": "<s>"}, CHATML)
    messages = [{"role": "user", "content": "the  then"}, {"role": "assistant", "content": "thané"}]
    text = chat.render_chat(messages)
    assert text == "<s><|user|>user\nthe  then</s>\n<|user|>assistant\nthané</s>\n<|user|>assistant\n"
    assert chat.encode_chat(messages) == backend.encode(text, add_special_tokens=False).ids


def test_templates_have_what_hugging_face_promises_them() -> None:
    template = (
        "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ enable_thinking }}"
    )
    tokenizer = Tokenizer(byte_level_backend(), template=template)
    messages = [{"role": "user", "content": "<é>"}] * 2
    assert tokenizer.render_chat(messages, enable_thinking=False) == '{"role": "user", "content": "<é>"}4TrueFalse'


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", str(MAX_CHAT_CHARS)),
    ],
)
def test_a_template_that_fails_says_why(template: str, cause: str) -> None:
    tokenizer = Tokenizer(byte_level_backend(), template=template)
    with pytest.raises(ChatTemplateError, match=cause):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_without_a_template_there_is_no_chat() -> None:
    assert not BYTE_LEVEL.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        BYTE_LEVEL.render_chat([])


def saved(folder: Path, config: object, template: str | None = None) -> Path:
    LIBRARY_BYTE_LEVEL.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_loading_a_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"eos_token": "</s>", "chat_template": "config"})
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 1, LIBRARY_BYTE_LEVEL.get_vocab_size())
    assert tokenizer.render_chat([]) == "config"


def test_the_template_file_goes_before_the_config(tmp_path: Path) -> None:
    assert Tokenizer.load(saved(tmp_path, {"chat_template": "config"}, "file")).render_chat([]) == "file"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = Tokenizer.load(saved(tmp_path, {"chat_template": named}))
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=[{"type": "function"}]) == "tools"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": '),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    folder = saved(tmp_path, {})
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"^(tokenizer(_config)?.json|chat template): [^\n]*expected[^\n]*$"):
        Tokenizer.load(folder)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*found none$"):
        Tokenizer.load(tmp_path)


def test_a_folder_with_a_sentencepiece_model_alone_is_told_what_makes_the_other(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only spiece\.model: .*AutoTokenizer"):
        Tokenizer.load(tmp_path)


STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason="an extra: needs the stories260K folder")
def test_stories260k_encodes_and_decodes_as_recorded() -> None:
    tokenizer = Tokenizer.load(STORIES)
    for case in json.loads((STORIES / "expected_greedy.json").read_text())["cases"]:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        assert tokenizer.decode(case["prompt_ids"] + case["new_ids"]) == case["text"]


GPT2 = STORIES.parents[1] / "tokenizers/gpt2"


@pytest.fixture(scope="module")
def gpt2() -> tokenizers.Tokenizer:
    if not GPT2.is_dir():
        pytest.skip("an extra: needs GPT-2's vocabulary")
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def test_gpt2_streams_any_ids_as_the_library_decodes_them(gpt2: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(gpt2)

    @given(ids=st.lists(st.integers(0, 50300), max_size=12))
    def check(ids: list[int]) -> None:
        assert streamed(tokenizer, [], ids) == gpt2.decode(ids)

    check()
