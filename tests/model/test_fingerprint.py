"""Two folders have one fingerprint exactly when they are one model, as far as reading a part of them can tell."""

import shutil
from pathlib import Path

import pytest

from model.config import EngineConfig
from model.fingerprint import PIECE_BYTES, WHOLE_BYTES, Fingerprint, fingerprint, queue_name

FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"\2\0\0\0\0\0\0\0{}weights"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def large(path: Path, size: int = 3 * WHOLE_BYTES) -> Path:
    """A sparse file with a header of two bytes."""
    with path.open("wb") as file:
        file.write(b"\2\0\0\0\0\0\0\0{}")
        file.truncate(size)
    return path


def poke(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\1")


def test_the_place_of_a_folder_and_what_else_is_in_it_do_not_matter(folder: Path) -> None:
    before = fingerprint(folder)
    elsewhere = shutil.copytree(folder, folder / "elsewhere")
    (elsewhere / "README.md").write_text("a model")
    assert fingerprint(elsewhere) == before
    assert before.weights is not None
    assert [len(before.door), len(before.weights)] == [16, 16]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_what_the_door_reads_changes_the_door_alone(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    (folder / name).write_bytes(b"{ }")
    after = fingerprint(folder)
    assert after.door != before.door
    assert after.weights == before.weights


def test_bytes_moved_from_one_file_to_the_next_are_noticed(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "config.json").write_bytes(b"{}[")
    (folder / "tokenizer.json").write_bytes(b"]")
    assert fingerprint(folder).door != before.door


def test_one_byte_of_a_small_weight_file_and_its_name_change_the_weights_alone(folder: Path) -> None:
    before = fingerprint(folder)
    path = folder / "model.safetensors"
    poke(path, 12)
    after = fingerprint(folder)
    path.rename(folder / "other.safetensors")
    assert len({before.weights, after.weights, fingerprint(folder).weights}) == 3
    assert before.door == after.door == fingerprint(folder).door


def test_a_folder_without_weights_has_a_door(folder: Path) -> None:
    door = fingerprint(folder).door
    (folder / "model.safetensors").unlink()
    assert fingerprint(folder) == Fingerprint(door, None)


@pytest.mark.parametrize("where", ["header", "first", "last", "size"])
def test_of_a_large_file_header_ends_and_size_count(folder: Path, where: str) -> None:
    path = large(folder / "model.safetensors")
    before, size = fingerprint(folder), path.stat().st_size
    if where == "size":
        large(path, size + 1)
    else:
        poke(path, {"header": 9, "first": PIECE_BYTES - 1, "last": size - 1}[where])
    assert fingerprint(folder).weights != before.weights


def test_of_a_large_file_what_lies_between_the_pieces_is_missed_and_a_wide_change_is_not(folder: Path) -> None:
    path = large(folder / "model.safetensors")
    before = fingerprint(folder)
    poke(path, PIECE_BYTES + 1)
    assert fingerprint(folder) == before
    for offset in range(0, 3 * WHOLE_BYTES, 2**19):
        poke(path, offset + 2**17)
    assert fingerprint(folder).weights != before.weights


def test_a_header_that_claims_more_than_there_is_reads_what_there_is(folder: Path) -> None:
    path = large(folder / "model.safetensors", WHOLE_BYTES + 1)
    with path.open("r+b") as file:
        file.write(b"\xff" * 8)
    assert fingerprint(folder).weights


def test_a_queue_is_named_by_all_that_its_workers_share() -> None:
    same = ("d", "w", "float32", 512, 1)
    others = [("e", *same[1:]), ("d", "x", *same[2:]), (*same[:2], "bfloat16", 512, 1), (*same[:3], 256, 1)]
    names = {queue_name(*each) for each in [same, *others, (*same[:4], 2)]}
    assert len(names) == 6
    assert {len(name) for name in names} == {16}


def test_engines_that_quantise_otherwise_have_queues_of_their_own() -> None:
    formats = [
        EngineConfig(dtype=d, quantize=q).number_format for d in ("float32", "bfloat16") for q in ("none", "int8")
    ]
    assert formats == ["float32", "float32-int8", "bfloat16", "bfloat16-int8"]
    assert len({queue_name("d", "w", each, 512, 1) for each in formats}) == 4
