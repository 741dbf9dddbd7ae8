"""Pairs of texts -> batches: reading them, one tokenizer for both sides, batches of pairs of about one length.

What a batch holds is a function of (seed, step) alone, as in `data.py`. Knows nothing of networks or optimisers.
"""

import gzip
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from model.training.data import END, Rows, train_tokenizer
from model.training.options import OptionError

Pair = tuple[str, str]
NOTHING = -1  # a target that is none: what stands behind the end of a shorter answer
NOISE_TOKENS = 4.0  # lengths that differ by less mix, so that no two epochs have the same batches


@dataclass(frozen=True, slots=True)
class PairBatch:
    """`source` [b, s], of which the first `lengths` [b] of each row are real; `inputs`, `targets` [b, t]: an answer
    after the starting id, and each id's follower, `NOTHING` behind the last one."""

    source: Rows
    lengths: Rows
    inputs: Rows
    targets: Rows

    @property
    def num_targets(self) -> int:
        """Ids to be predicted."""
        return int((self.targets != NOTHING).sum())


def read_lines(file: Path, name: str) -> list[str]:
    """The lines of a text file in UTF-8, packed by gzip or xz or not at all. Raises OptionError."""
    try:
        raw = file.read_bytes()
        raw = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(file.suffix, bytes)(raw)
        return raw.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, lzma.LZMAError, UnicodeDecodeError, EOFError) as error:
        raise OptionError(f"--{name} {file}: can't be read as UTF-8 text: {error}") from error


def read_pairs(source: Path, target: Path | None, name: str = "data") -> list[Pair]:
    """Pairs of a file with a tab in each line, or of two files whose lines belong together; those with an empty side
    are left out. Raises OptionError."""
    lines = read_lines(source, name)
    if target is not None:
        others = read_lines(target, "target")
        if len(lines) != len(others):
            raise OptionError(f"--target {target}: {len(others)} lines, expected {len(lines)} as in {source}")
        pairs = [(line.strip(), other.strip()) for line, other in zip(lines, others, strict=True)]
    else:
        pairs = []
        for number, line in enumerate(lines, 1):
            first, tab, second = line.partition("\t")
            if not tab or "\t" in second:
                raise OptionError(f"--{name} {source}: line {number} has no two texts with one tab between them")
            pairs.append((first.strip(), second.strip()))
    pairs = [pair for pair in pairs if all(pair)]
    if not pairs:
        raise OptionError(f"--{name} {source}: no pairs in it")
    return pairs


def pair_tokenizer(pairs: Sequence[Pair], vocab_size: int) -> Tokenizer:
    """One tokenizer for both languages; behind a text it puts END."""
    tokenizer = train_tokenizer([text for pair in pairs for text in pair], vocab_size)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


@dataclass(frozen=True)
class PairData:
    """Tokenised pairs: `sources`, `targets` are ids, each with END behind; longer ones than `longest` are left out."""

    sources: list[list[int]]
    targets: list[list[int]]
    start_id: int

    @classmethod
    def of(cls, pairs: Sequence[Pair], tokenizer: Tokenizer, longest: int) -> "PairData":
        """Raises OptionError when nothing is left."""
        sides = [[each.ids for each in tokenizer.encode_batch(list(texts))] for texts in zip(*pairs, strict=True)]
        kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= longest]
        if not kept:
            raise OptionError(f"--context {longest}: none of {len(pairs)} pairs is as short as that")
        start_id = tokenizer.encode("").ids[-1]  # END: what ends a text begins an answer
        return cls([source for source, _ in kept], [target for _, target in kept], start_id)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each pair, both sides together."""
        return np.array([len(s) + len(t) for s, t in zip(self.sources, self.targets, strict=True)])

    def num_batches(self, batch_tokens: int) -> int:
        """Batches of one epoch."""
        return max(1, round(int(self.sizes.sum()) / batch_tokens))

    def draw(self, seed: int, step: int, batch_tokens: int) -> PairBatch:
        """The batch of a step: pairs of about one length, of about `batch_tokens` tokens together."""
        num = self.num_batches(batch_tokens)
        epoch, place = divmod(step, num)
        random = np.random.default_rng((seed, epoch))
        order = np.argsort(self.sizes + random.uniform(0, NOISE_TOKENS, len(self.sizes)), kind="stable")
        starts = np.cumsum(self.sizes[order]) - self.sizes[order]
        number, total = int(random.permutation(num)[place]), int(self.sizes.sum())
        first, last = np.searchsorted(starts, [total * number // num, total * (number + 1) // num])
        return self.batch(order[first : max(last, first + 1)].tolist())

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """These pairs, padded."""
        sources, targets = [self.sources[i] for i in numbers], [self.targets[i] for i in numbers]
        return PairBatch(
            _padded(sources, 0),
            np.array([len(source) for source in sources]),
            _padded([[self.start_id, *target[:-1]] for target in targets], 0),
            _padded(targets, NOTHING),
        )

    def batches(self, batch_tokens: int) -> list[PairBatch]:
        """All pairs once, shortest first."""
        order, batches, taken = np.argsort(self.sizes, kind="stable").tolist(), list[PairBatch](), list[int]()
        for number in order:
            if taken and self.sizes[number] * (len(taken) + 1) > batch_tokens:
                batches.append(self.batch(taken))
                taken = []
            taken.append(number)
        return [*batches, self.batch(taken)]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Rows:
    whole = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for row, ids in zip(whole, rows, strict=True):
        row[: len(ids)] = ids
    return whole
