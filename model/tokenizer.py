"""Text to ids and ids to text, for the tokenizer of a Hugging Face folder. It knows no request and no network.

Decoding is a table from id to bytes with a UTF-8 decoder behind it, so decoding all at once and token by token are the
same computation. For byte-level tokenizers it gives what the tokenizers library gives, for any ids. With byte-fallback
tokens it differs in one case, where that library's answer can't be streamed: a run of byte tokens that is not valid
UTF-8 as a whole. The library replaces every byte of such a run, even its good characters; here the good characters
stay and each bad sequence becomes one U+FFFD (Unicode standard 3.9, maximal subparts).
"""

import json
import re
from codecs import utf_8_decode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors

from model.chat_template import ChatTemplates, one_line, templates_of
from model.config import CheckpointError

_MARK = "\ufdd0"  # a noncharacter, by Unicode for internal use: it splits the control tokens written out in user text
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEVER = r"(?!)"
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_BYTE_LEVEL_DECODERS = {"Sequence", "Fuse", "ByteLevel"}
_OTHER_DECODERS = {"Sequence", "Fuse", "Replace", "Strip", "ByteFallback", "Metaspace", "WordPiece"}


class Tokenizer:
    """Safe to share between threads. Ids below `vocab_size` can be decoded; others decode to nothing. `control_ids` are
    those of control tokens, which have a name and no text.

    `bos_id` and `eos_id` are what tokenizer_config.json names, None where it names none.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, object] | None = None, template: str | None = None
    ) -> None:
        """Takes `backend` over. `config` is a tokenizer_config.json; `template` goes before the chat template in it.

        Raises `CheckpointError` for a decoder, a chat template or a setting that can't be used.
        """
        config = config or {}
        named = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
        self._named = {key: token for key, token in named.items() if token is not None}
        known = [token for token in self._named.values() if backend.token_to_id(token) is not None]
        backend.add_special_tokens(known)
        backend.no_truncation()  # tokenizer.json may hold both, left from training; a prompt is never cut silently
        backend.no_padding()
        backend.encode_special_tokens = True  # user text never becomes a control token
        if "add_bos_token" in config or "add_eos_token" in config:
            backend.post_processor = _framing(backend, config, self._named)
        self._backend = backend
        self.bos_id = _token_id(backend, self._named.get("bos_token"))
        self.eos_id = _token_id(backend, self._named.get("eos_token"))

        added = dict(sorted(backend.get_added_tokens_decoder().items()))
        self.control_ids = self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._pieces = _Pieces(backend)
        self.vocab_size = self._pieces.vocab_size
        self._templates = ChatTemplates({"default": template} if template is not None else templates_of(config))
        self.has_chat_template = bool(self._templates)
        literals = [token.content for token in added.values() if token.special]
        control = "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in literals)
        if control and _takes_whole_words(backend.model):
            cut = pre_tokenizers.Split(Regex(control), "isolated")
            before = backend.pre_tokenizer
            backend.pre_tokenizer = pre_tokenizers.Sequence([before, cut]) if before else cut
        self._control = re.compile(control or _NEVER)
        self._chat = _chat_backend(backend, added.values())

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where they exist.

        Raises `CheckpointError` naming the file.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            other = next((name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
            found = f"only {other}: AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one"
            raise CheckpointError(f"tokenizer.json: expected in the model folder, found {found if other else 'none'}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"tokenizer.json: expected a tokenizer, found: {one_line(error)}") from error
        return cls(backend, _read_config(folder / "tokenizer_config.json"), _read_template(folder))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a raw prompt; `special` adds what the tokenizer puts around a text (say, beginning-of-sequence).

        A control token written out inside `text` is encoded as the characters it is made of. Raises `ValueError` for a
        lone surrogate. Takes about 1 µs a byte: not for an event loop.
        """
        return _encode(self._backend, text, special)

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> list[int]:
        """Ids of a conversation, by the model's chat template.

        Control tokens that the template writes are parsed; those written out in `messages` or `variables` are text.
        Raises `ChatTemplateError`, and `ValueError` for a lone surrogate.
        """
        marked = cast(dict[str, object], self._mark({**variables, "messages": messages}))
        return _encode(self._chat, self._render(marked, add_generation_prompt), special=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The text of a conversation, for people: `encode_chat` makes the ids.

        `variables` reach the template as they are (`tools=...`); which ones a client may set is the caller's business.
        Raises `ChatTemplateError`.
        """
        return self._render({**variables, "messages": messages}, add_generation_prompt)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids, control tokens left out if `skip_special`; bad UTF-8 becomes U+FFFD."""
        detokenizer = Detokenizer(self._pieces, self._special if skip_special else frozenset())
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def detokenizer(self, prefix_ids: Sequence[int] = ()) -> "Detokenizer":
        """A decoder that goes on where `prefix_ids` end.

        The first token keeps its leading space, and a character that the prefix leaves unfinished is finished by what
        is pushed: the prefix's finished characters, the pushed text and the flushed text make `decode(all ids)`.
        """
        tail: list[int] = []
        for token_id in reversed(prefix_ids):
            if len(tail) == 3:  # no more bytes than that can wait for the rest of their character
                break
            if self._pieces[token_id] and token_id not in self._special:
                tail.append(token_id)
        detokenizer = Detokenizer(self._pieces, self._special)
        for token_id in reversed(tail):
            detokenizer.push(token_id)
        return detokenizer

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token in the middle of a text; for a control token, its name."""
        return self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """A token's text, for log-probabilities. Part of a character is written OpenAI's way: `bytes:\\xe2\\x80`."""
        piece = self._pieces[token_id]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _render(self, variables: Mapping[str, object], add_generation_prompt: bool) -> str:
        standard = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._templates.render({**standard, **self._named, **variables})

    def _mark(self, value: object) -> object:
        """A copy with `_MARK` in every control token written out in it: in strings, in lists and in dicts' values."""
        if isinstance(value, str):
            return self._control.sub(lambda match: match[0] + _MARK, value)
        if isinstance(value, Mapping):
            return {key: self._mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item) for item in value]
        return value


class Detokenizer:
    """One stream of ids to text: `push` gives the characters that an id completes, `flush` what is left at the end."""

    __slots__ = ("_hidden", "_pending", "_pieces", "_started")

    def __init__(self, pieces: "_Pieces", hidden: frozenset[int]) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._pending = b""  # the bytes of an unfinished character
        self._started = False

    def push(self, token_id: int) -> str:
        """The characters that are complete with this id; "" inside a character and for hidden and unknown ids."""
        piece = self._pieces[token_id]
        if not piece or token_id in self._hidden:
            return ""
        if not self._started:
            self._started = True
            piece = self._pieces.at_start(token_id)
        data = self._pending + piece
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        """U+FFFD if a character is unfinished, else ""."""
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", "replace")


class _Pieces(dict[int, bytes]):
    """The bytes of each id as they are in the middle of a text, worked out when first asked for."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        kinds = set(_decoder_kinds(backend))
        if not (kinds <= _BYTE_LEVEL_DECODERS or kinds <= _OTHER_DECODERS):
            allowed, found = (", ".join(sorted(names)) for names in (_BYTE_LEVEL_DECODERS | _OTHER_DECODERS, kinds))
            raise CheckpointError(f"tokenizer.json: decoder: expected ByteLevel or some of {allowed}, found {found}")
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._backend = backend
        vocab = backend.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        # Many decoders treat a text's first token otherwise, so the others are looked at behind an ordinary one.
        self._anchor = next(([i] for token, i in vocab.items() if self._is_ordinary(i, token)), [])

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        self[token_id] = piece = self._spell(token_id, token)
        return piece

    def at_start(self, token_id: int) -> bytes:
        """The bytes of an id that begins a text: SentencePiece-like decoders drop its leading space."""
        if self._byte_level:
            return self[token_id]
        alone = self._decode([token_id])
        return self[token_id] if "\ufffd" in alone else alone.encode()  # U+FFFD: a byte token of a longer character

    def _spell(self, token_id: int, token: str) -> bytes:
        if self._byte_level:
            letters = [_BYTE_OF_LETTER.get(letter, -1) for letter in token]
            return token.encode() if -1 in letters else bytes(letters)
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return self._decode([*self._anchor, token_id]).removeprefix(self._decode(self._anchor)).encode()

    def _is_ordinary(self, token_id: int, token: str) -> bool:
        return not _BYTE_TOKEN.fullmatch(token) and self._decode([token_id]).isalnum()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _framing(
    backend: tokenizers.Tokenizer, config: Mapping[str, object], named: Mapping[str, str]
) -> processors.TemplateProcessing:
    """The special tokens tokenizer_config.json wants around a text; as in transformers, it overrules tokenizer.json."""
    parts, ids = ["$A"], []
    for key, where in (("bos_token", 0), ("eos_token", 2)):
        if config.get(f"add_{key}"):
            token_id = _token_id(backend, named.get(key))
            if token_id is None:
                found = named.get(key)
                raise CheckpointError(f"tokenizer_config.json: {key}: expected one in the vocabulary, found {found!r}")
            parts.insert(where, named[key])
            ids.append((named[key], token_id))
    return processors.TemplateProcessing(single=parts, special_tokens=ids)


def _takes_whole_words(model: models.Model) -> bool:
    """Whether it finds a token in its vocabulary by its text alone: then it finds control tokens, if they are there, in
    anybody's text. Merges never lead to one."""
    return not isinstance(model, models.BPE) or bool(model.ignore_merges)


def _chat_backend(backend: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> tokenizers.Tokenizer:
    """A second front on the same vocabulary that parses control tokens, but none that has `_MARK` inside.

    They are looked for before normalising, and normalising takes the marks out.
    """
    chat = tokenizers.Tokenizer(backend.model)
    unmark = normalizers.Replace(_MARK, "")
    chat.normalizer = normalizers.Sequence([unmark, backend.normalizer]) if backend.normalizer else unmark
    if backend.pre_tokenizer is not None:
        chat.pre_tokenizer = backend.pre_tokenizer
    for token in added:
        early = AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized and not token.special,
            special=token.special,
        )
        chat.add_tokens([early])
    return chat


def _encode(backend: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=special).ids
    except TypeError:
        raise ValueError("the text has a lone surrogate, which UTF-8 can't hold") from None


def _decoder_kinds(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """The type names in a decoder, parts included; none for a tokenizer without one (it joins tokens by spaces)."""
    waiting = [json.loads(cast(bytes, backend.decoder.__getstate__()))] if backend.decoder else []
    while waiting:
        decoder = waiting.pop()
        yield decoder["type"]
        waiting += decoder.get("decoders", [])


def _read_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path.name}: expected JSON, found: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path.name}: expected a JSON object, found {type(config).__name__}")
    return config


def _read_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path.name}: expected UTF-8, found: {one_line(error)}") from error


def _content(token: object) -> str | None:
    """A token in tokenizer_config.json is a string or an object with its `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _token_id(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _byte_letters() -> dict[str, int]:
    """GPT-2's way to write any byte as a visible letter (openai/gpt-2, encoder.py): bytes that are printable in Latin-1
    stand for themselves, the others, in order, for the letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()
