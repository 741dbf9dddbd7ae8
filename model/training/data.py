"""Text -> batches: reading files, splitting off validation documents, training the tokenizer, packing, drawing batches.

What a batch holds is a function of (seed, step) alone, so a run that was killed goes on exactly as it would have.
Knows nothing of networks or optimisers.
"""

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model.training.options import OptionError

END = "<|endoftext|>"
"""Stands before every document: the beginning and the end of a text are one token, with id 0."""

# Words with their leading space, numbers up to three digits, punctuation, and a paragraph break as one piece.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s+"

Ids = NDArray[np.uint16]
Rows = NDArray[np.int64]


def read_documents(file: Path) -> list[str]:
    """Documents of a .txt or .txt.xz file in UTF-8; `<|endoftext|>` separates them. Raises OptionError."""
    try:
        raw = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise OptionError(f"--data {file}: can't be read as UTF-8 text: {error}") from error
    return [document for piece in text.split(END) if (document := piece.strip())]


def load_split(source: Path, valid_fraction: float) -> tuple[list[str], list[str]]:
    """(training, validation) documents of a file, or of a folder's *.txt and *.txt.xz files.

    Files named valid* are validation; without one, the last documents are held out until they have `valid_fraction` of
    the characters. Raises OptionError when either half would be empty.
    """
    files = sorted(f for f in source.iterdir() if f.name.endswith((".txt", ".txt.xz"))) if source.is_dir() else [source]
    train = [d for f in files if not f.name.startswith("valid") for d in read_documents(f)]
    valid = [d for f in files if f.name.startswith("valid") for d in read_documents(f)]
    if not valid:
        wanted = valid_fraction * sum(map(len, train))
        while len(train) > 1 and sum(map(len, valid)) < wanted:
            valid.insert(0, train.pop())
    if not train or not valid:
        found = f"{len(train)} documents for training and {len(valid)} for validation"
        raise OptionError(f"--data {source}: {found}, expected one or more of each (a line {END} ends a document)")
    return train, valid


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (as GPT-2's): any text can be encoded, and decoding gives it back to the byte."""
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def pack(documents: Sequence[str], tokenizer: Tokenizer) -> Ids:
    """All documents in one row of ids [n], each with END in front."""
    rows: list[Ids] = []
    for start in range(0, len(documents), 256):
        encodings = tokenizer.encode_batch(documents[start : start + 256])
        rows.extend(np.array(e.ids, dtype=np.uint16) for e in encodings)
    return np.concatenate(rows)


def token_sizes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each token stands for, [vocab]: a byte-level token's name has one character a byte, and END
    is no text."""
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for name, token in tokenizer.get_vocab().items():
        sizes[token] = 0 if name == END else len(name)
    return sizes


@dataclass(frozen=True, slots=True)
class Batches:
    """Draws training batches from a row of ids, cut into pieces of the length asked for and shuffled every epoch."""

    ids: Ids
    seed: int

    def draw(self, step: int, num_tokens: int, length: int) -> tuple[Rows, Rows]:
        """Inputs and the tokens that follow them, each [num_tokens / length, length]. Raises OptionError."""
        if len(self.ids) <= length:
            raise OptionError(f"--context {length}: the training text has only {len(self.ids)} tokens")
        per_step = num_tokens // length
        rows = [self._piece(number, length) for number in range(step * per_step, (step + 1) * per_step)]
        return _inputs_and_targets(rows)

    def _piece(self, number: int, length: int) -> Ids:
        pieces = (len(self.ids) - 1) // length
        epoch, place = divmod(number, pieces)
        order = np.random.default_rng((self.seed, length, epoch)).permutation(pieces)
        start = int(order[place]) * length
        return self.ids[start : start + length + 1]


def windows(ids: Ids, length: int, num: int) -> Iterator[tuple[Rows, Rows]]:
    """The whole row once, in order: inputs and following tokens [<= num, length], and a shorter last window."""
    starts = range(0, (len(ids) - 1) // length * length, length)
    for first in range(0, len(starts), num):
        yield _inputs_and_targets([ids[s : s + length + 1] for s in starts[first : first + num]])
    rest = ids[len(starts) * length :]
    if len(rest) > 1:
        yield _inputs_and_targets([rest])


def _inputs_and_targets(rows: list[Ids]) -> tuple[Rows, Rows]:
    batch = np.stack(rows).astype(np.int64)
    return batch[:, :-1], batch[:, 1:]
