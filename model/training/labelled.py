"""Labelled texts -> batches: reading tables, splitting by content, training a WordPiece tokenizer, masking.

Which part a text belongs to is a function of the text, and what a batch holds one of (seed, step). Knows nothing of
networks or optimisers.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.training.options import OptionError

PAD, UNKNOWN, BEGIN, END, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTROL = len(SPECIAL)  # ids below are no words
HIDDEN = (
    0.15  # part of the words to be filled in; of these as many as BERT has it become the mask, another word, or stay
)
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Texts with their labels, by part: what is trained on, what is looked at meanwhile, and what only at the end."""

    train: list[tuple[str, str]]
    valid: list[tuple[str, str]]
    test: list[tuple[str, str]]

    @property
    def labels(self) -> tuple[str, ...]:
        """All that there are in training, in order."""
        return tuple(sorted({label for label, _ in self.train}))


def load_labelled(file: Path, valid_fraction: float, test_fraction: float) -> Split:
    """A .csv or .tsv file with a header, of which one column is `label` and one other the text.

    A text is in a part by its SHA-256, so that the same text is never in two of them and the order of rows is nothing.
    Raises OptionError.
    """
    split = Split([], [], [])
    for label, text in _rows(file):
        place = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
        held_out = split.test if place < test_fraction else split.valid
        (held_out if place < test_fraction + valid_fraction else split.train).append((label, text))
    if not (split.train and split.valid and split.test) or len(split.labels) < 2:
        found = f"{len(split.train)}, {len(split.valid)} and {len(split.test)} texts to train, validate and test"
        raise OptionError(
            f"--data {file}: {found} with {len(split.labels)} labels, expected some of each and two labels"
        )
    unknown = {label for label, _ in split.valid + split.test} - set(split.labels)
    if unknown:
        raise OptionError(f"--data {file}: no text to train on has the label {min(unknown)!r}")
    return split


def _rows(file: Path) -> list[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t" if file.suffix == ".tsv" else ",")
            names = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"--data {file}: can't be read as a table in UTF-8: {error}") from error
    if "label" not in names or len(names) != 2:
        raise OptionError(f"--data {file}: found the columns {', '.join(names)}, expected `label` and one other")
    text_name = next(name for name in names if name != "label")
    return [(label, text) for row in rows if (label := row["label"] or "") and (text := (row[text_name] or "").strip())]


def train_word_pieces(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """BERT's tokenizer: lower case, each Chinese character a word, WordPiece inside of words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # The library numbers pieces in an order that differs from run to run.
    words = sorted(tokenizer.get_vocab().keys() - set(SPECIAL))
    numbers = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer.model = models.WordPiece(numbers, unk_token=UNKNOWN)
    frame = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B:1 {END}:1", special_tokens=frame
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Labelled:
    """Tokenised texts, cut to the longest that the network takes, and the numbers of their labels."""

    texts: list[Ids]
    labels: Ids

    @classmethod
    def of(
        cls, rows: Sequence[tuple[str, str]], labels: Sequence[str], tokenizer: Tokenizer, longest: int
    ) -> "Labelled":
        """Of an overlong text the end goes, but for the token that closes every text."""
        encoded = [each.ids for each in tokenizer.encode_batch([text for _, text in rows])]
        cut = [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in encoded]
        numbers = {label: number for number, label in enumerate(labels)}
        return cls([np.array(ids) for ids in cut], np.array([numbers[label] for label, _ in rows]))

    def draw(self, seed: int, step: int, num: int) -> "Labelled":
        """The texts of a training step; every epoch has its own order."""
        size, picked = len(self.texts), list[int]()
        for number in range(step * num, (step + 1) * num):
            epoch, place = divmod(number, size)
            picked.append(int(np.random.default_rng((seed, epoch)).permutation(size)[place]))
        return Labelled([self.texts[i] for i in picked], self.labels[picked])

    def majority(self) -> float:
        """How often the most frequent label is right."""
        return Counter(self.labels.tolist()).most_common(1)[0][1] / len(self.labels)


def masked(ids: Ids, vocab_size: int, draws: np.random.Generator) -> tuple[Ids, NDArray[np.bool_]]:
    """Some words hidden, and which (arXiv 1810.04805, section 3.1): of these 8 in 10 become the mask, 1 in 10 any other
    word, 1 in 10 stay."""
    hidden = (draws.random(ids.shape) < HIDDEN) & (ids >= CONTROL)
    kind = draws.random(ids.shape)
    out = np.where(hidden & (kind < 0.8), SPECIAL.index(MASK), ids)
    return np.where(hidden & (kind >= 0.9), draws.integers(CONTROL, vocab_size, ids.shape), out), hidden


def thinned(ids: Ids, part: float, draws: np.random.Generator) -> Ids:
    """With this part of the words masked: no label shall hang on a single one."""
    return np.where((draws.random(ids.shape) < part) & (ids >= CONTROL), SPECIAL.index(MASK), ids)
