"""Text to batches: reading, splitting, the tokenizer, packing, and drawing by (seed, step)."""

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from model.training import data
from model.training.options import OptionError

DOCUMENTS = [
    'The fox ran home.\n\n"Well," said he, "it\'s 10 o\'clock."',
    "A wee tale.",
    "The cat sat, and the fox sat.",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return data.train_tokenizer(DOCUMENTS * 5, 300)


def test_reads_documents_from_text_and_xz(tmp_path: Path) -> None:
    text = f"one\r\n\r\ntwo\r\n{data.END}\r\n\n{data.END}\nthree\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("a.txt", "a.txt.xz"):
        assert data.read_documents(tmp_path / name) == ["one\n\ntwo", "three"]


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_unreadable_text_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(OptionError, match=r"bad\.txt: can't be read"):
        data.read_documents(tmp_path / "bad.txt")


def test_files_named_valid_are_validation(tmp_path: Path) -> None:
    for name, text in {"valid-1.txt": "v", "a.txt": "x", "b.txt": f"y\n{data.END}\nz", "notes.md": "no"}.items():
        (tmp_path / name).write_text(text)
    assert data.load_split(tmp_path, 0.5) == (["x", "y", "z"], ["v"])


def test_a_slice_of_whole_documents_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"\n{data.END}\n".join(f"story {i}" for i in range(10)))
    train, valid = data.load_split(tmp_path / "a.txt", 0.15)
    assert valid == ["story 8", "story 9"]
    assert train == [f"story {i}" for i in range(8)]


def test_text_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("only one story")
    with pytest.raises(OptionError, match="1 documents for training and 0 for validation"):
        data.load_split(tmp_path, 0.5)


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    if data.END not in text:
        assert tokenizer.decode(ids) == text


def test_pieces_keep_words_and_paragraph_breaks_apart(tokenizer: Tokenizer) -> None:
    assert tokenizer.pre_tokenizer is not None
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's he.\n\nNo 1234")]
    assert pieces == ["It", "'s", "Ġhe", ".", "ĊĊ", "No", "Ġ123", "4"]


def test_packing_puts_the_mark_before_every_document(tokenizer: Tokenizer) -> None:
    ids = data.pack(DOCUMENTS, tokenizer)
    starts = np.flatnonzero(ids == 0)
    parts = [tokenizer.decode(part.tolist()) for part in np.split(ids, starts[1:])]
    assert starts[0] == 0
    assert parts == DOCUMENTS


def test_token_sizes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    documents = [*DOCUMENTS, "ünïcödé — 語"]
    ids = data.pack(documents, tokenizer)
    assert data.token_sizes(tokenizer)[ids].sum() == sum(len(d.encode()) for d in documents)


def test_an_epoch_draws_every_piece_once_in_another_order() -> None:
    batches = data.Batches(np.arange(97, dtype=np.uint16), seed=3)
    epochs = [np.concatenate([batches.draw(step, 24, 8)[0] for step in steps]) for steps in (range(4), range(4, 8))]
    for rows in epochs:
        assert sorted(rows.flatten()) == list(range(96))
    assert not np.array_equal(epochs[0], epochs[1])


def test_targets_follow_inputs_whatever_the_length() -> None:
    batches = data.Batches(np.arange(100, dtype=np.uint16), seed=1)
    for length in (4, 12):
        inputs, targets = batches.draw(5, 24, length)
        assert inputs.shape == (24 // length, length)
        assert np.array_equal(inputs + 1, targets)


def test_too_little_text_for_one_sequence_is_refused() -> None:
    with pytest.raises(OptionError, match="has only 8 tokens"):
        data.Batches(np.arange(8, dtype=np.uint16), 1).draw(0, 8, 8)


@pytest.mark.parametrize("num_ids", [2, 8, 9, 10, 40])
def test_windows_predict_every_token_but_the_first_once(num_ids: int) -> None:
    ids = np.arange(num_ids, dtype=np.uint16)
    targets = [t for _, rows in data.windows(ids, 8, 2) for t in rows.flatten()]
    assert targets == list(range(1, num_ids))
