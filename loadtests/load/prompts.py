"""Prompts of a wished length, as token ids or as text, and the same beginning where a trace says so.

The words are those of a book, so that a model reads what it could have been asked. It sends nothing.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from loadtests.load.traces import Arrival

TEXT = Path(__file__).parent.parent / "validation.txt"
FIRST_GUESS = 1.3  # tokens a word
SAMPLE = 40  # words
T = TypeVar("T")


class Prompts:
    """`ids` are the text's, from the server's own tokenizer, where it tells them; lengths are then exact. As text a
    prompt has so many words as make about the tokens, once the server has counted those of a sample."""

    def __init__(self, text: str, ids: Sequence[int] = ()) -> None:
        self._words, self._ids, self._tokens_per_word = text.split(), list(ids), FIRST_GUESS

    @property
    def has_ids(self) -> bool:
        """Whether prompts of exact lengths can be made."""
        return bool(self._ids)

    def sample(self, num_words: int = SAMPLE) -> str:
        """For a server to count."""
        return " ".join(self._words[:num_words])

    def counted(self, num_tokens: int, num_words: int = SAMPLE) -> None:
        """The sample has so many tokens. Counted once: with another measure equal hashes would become other text."""
        self._tokens_per_word = max(0.2, num_tokens / num_words)

    def ids(self, wished: Arrival) -> list[int]:
        """Exactly `num_prompt` token ids."""
        return _cut(self._ids, wished.num_prompt, wished.hash_ids, wished.block)

    def text(self, wished: Arrival) -> str:
        """About `num_prompt` tokens of text."""
        per_word = self._tokens_per_word
        num_words, block = max(1, round(wished.num_prompt / per_word)), max(1, round(wished.block / per_word))
        return " ".join(_cut(self._words, num_words, wished.hash_ids, block))


def _cut(book: Sequence[T], num: int, hash_ids: Sequence[int], block: int) -> list[T]:
    """`num` pieces: for each hash a passage of its own, and a random one where there are no more hashes. A passage
    begins with two pieces that spell its hash, so that no two are equal."""
    made, size = list[T](), len(book)
    for each in hash_ids:
        passage = [book[each % size], book[each // size % size], *_from(book, each * 7919 % size, block)]
        made += passage[:block]
    if len(made) < num:
        made += _from(book, random.randrange(size), num - len(made))
    return made[:num]


def _from(book: Sequence[T], start: int, num: int) -> list[T]:
    whole = [*book[start:], *book[:start]]
    return (whole * (num // len(whole) + 1))[:num]
