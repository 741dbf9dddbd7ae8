"""Reading tensors: the quirks of real folders that must load, and everything else, which must not."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import CheckpointError, ModelConfig
from model.families.registry import FAMILIES, read_config
from model.nn.decoder import Decoder
from model.weights import load_decoder, read_header

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
RAW: dict[str, dict[str, object]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    **{name: {"model_type": name, **SIZES} for name in ("llama", "mistral", "qwen2", "qwen3")},
}
Tensors = dict[str, Tensor]


def tensors_of(decoder: Decoder, family: str) -> Tensors:
    """A decoder's parameters as its family's checkpoints hold them."""
    state, found = decoder.state_dict(), {}
    for rule in FAMILIES[family].rules(decoder.config):
        for name, part in zip(rule.theirs, state[rule.ours].split(rule.sizes), strict=True):
            found[name] = (part.t() if rule.transpose else part).contiguous()
    return found


class Folder:
    """A checkpoint to be spoilt: `raw` and `tensors` are written by `load`."""

    def __init__(self, path: Path, family: str = "llama") -> None:
        torch.manual_seed(0)
        self.path, self.raw = path, dict(RAW[family])
        self.decoder = Decoder(FAMILIES[family].read_config(self.raw))
        self.tensors = tensors_of(self.decoder, family)

    def save(self) -> None:
        (self.path / "config.json").write_text(json.dumps(self.raw))
        save_file(self.tensors, self.path / "model.safetensors")

    def load(self, dtype: torch.dtype = torch.float32) -> Decoder:
        return load_decoder(self.path, self.config(), dtype, CPU)

    def config(self) -> ModelConfig:
        return read_config(self.path)

    def assert_loads(self) -> None:
        loaded, expected = self.load().state_dict(), self.decoder.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)

    def assert_refused(self, *parts: str) -> None:
        with pytest.raises(CheckpointError) as refusal:
            self.load()
        message = str(refusal.value)
        assert all(part in message for part in (str(self.path), *parts)), message
        assert "\n" not in message


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize("family", RAW)
def test_every_parameter_is_filled_and_frozen(tmp_path: Path, family: str) -> None:
    folder = Folder(tmp_path, family)
    folder.save()
    folder.assert_loads()
    decoder = folder.load(torch.bfloat16)
    assert not decoder.training
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 and not p.is_meta for p in decoder.parameters())
    assert all(not b.is_meta and b.dtype == torch.float32 for b in decoder.buffers())


def test_parameters_do_not_live_in_the_file(folder: Folder) -> None:
    folder.save()
    decoder = folder.load()
    (folder.path / "model.safetensors").write_bytes(b"\0" * (folder.path / "model.safetensors").stat().st_size)
    assert torch.equal(decoder.embed.weight, folder.decoder.embed.weight)


@pytest.mark.parametrize("family", RAW)
def test_derived_buffers_are_ignored(tmp_path: Path, family: str) -> None:
    folder = Folder(tmp_path, family)
    if family == "gpt2":
        folder.tensors["transformer.h.1.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        folder.tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    else:
        folder.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    folder.save()
    folder.assert_loads()


@pytest.mark.parametrize("family", RAW)
def test_names_without_the_base_prefix_are_accepted(tmp_path: Path, family: str) -> None:
    folder = Folder(tmp_path, family)
    folder.tensors = {name.removeprefix(FAMILIES[family].prefix): t for name, t in folder.tensors.items()}
    folder.save()
    folder.assert_loads()


def test_a_stored_tied_head_must_be_equal(folder: Folder) -> None:
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"].clone()
    folder.save()
    folder.assert_loads()
    folder.tensors["lm_head.weight"][0, 0] += 1
    folder.save()
    folder.assert_refused("'lm_head.weight'", "differs from model.embed_tokens.weight", "tied")


def drop(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def add(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)


def add_head(tensors: Tensors) -> None:
    tensors["lm_head.bias"] = torch.ones(11)


def add_twice(tensors: Tensors) -> None:
    tensors["norm.weight"] = torch.ones(8)


def reshape(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(8, 4)


def make_nan(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 2] = torch.nan


def make_inf(tensors: Tensors) -> None:
    tensors["model.norm.weight"][3] = -torch.inf


def make_int(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = torch.ones(8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (drop, ("model.safetensors: tensor 'model.norm.weight' not found",)),
        (add, ("tensor 'model.layers.0.self_attn.q_proj.bias' found, expected by nothing in config.json (llama)",)),
        (add_head, ("tensor 'lm_head.bias' found",)),
        (add_twice, ("'norm.weight'", "found with and without 'model.' before it")),
        (reshape, ("'model.layers.0.self_attn.k_proj.weight'", "shape [8, 4], expected [4, 8]")),
        (make_nan, ("'model.layers.1.mlp.down_proj.weight'", "1 of 48 numbers are NaN or infinite")),
        (make_inf, ("'model.norm.weight'", "NaN or infinite")),
        (make_int, ("'model.norm.weight'", "dtype I8, expected one of F32, BF16, F16")),
    ],
)
def test_spoilt_tensors_are_refused(folder: Folder, spoil: Callable[[Tensors], None], parts: tuple[str, ...]) -> None:
    spoil(folder.tensors)
    folder.save()
    folder.assert_refused(*parts)


def test_a_projection_stored_the_other_way_round_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "gpt2")
    folder.tensors["transformer.h.0.mlp.c_fc.weight"] = torch.ones(32, 8)
    folder.save()
    folder.assert_refused("'transformer.h.0.mlp.c_fc.weight'", "shape [32, 8], expected [8, 32]")


def test_numbers_beyond_the_wanted_dtype_are_refused(folder: Folder) -> None:
    folder.tensors["model.norm.weight"][0] = 1e5
    folder.save()
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' up to 100000, expected at most 65504 for float16"):
        folder.load(torch.float16)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, 7, "found 7 bytes of data, expected 8"),
        ({"a": entry(0, 8)}, 9, "found 9 bytes of data, expected 8"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' found at byte 4 of the data, expected at 8"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "'b' found at byte 12 of the data, expected at 8"),
        ({"a": entry(8, 0)}, 8, "found -8 bytes, expected 8 for F32 of shape"),
        ({"a": entry(0, 8, [3])}, 8, "'a': found 8 bytes, expected 12 for F32 of shape"),
        ({"a": entry(0, 8, [-2])}, 8, "'a': expected dtype, shape and data_offsets"),
        ({"a": entry(0, 8, [True, 2])}, 8, "'a': expected dtype, shape and data_offsets"),
        ({"a": entry(0, 8, dtype=32)}, 8, "'a': expected dtype, shape and data_offsets"),
        ({"a": entry(0, 8, dtype="Q4")}, 8, "'a': dtype 'Q4', expected one of F32"),
        ({"a": 5}, 8, "'a': expected dtype, shape and data_offsets"),
        ([1], 0, "bad header, expected a JSON object"),
        (b'{"a": ', 0, "bad header"),
        (b"[" * 100_000, 0, "bad header"),
        (b'{"a": 1, "a": 2}', 0, "'a' is there twice"),
        (b"\xff\xfe\xfd", 0, "bad header"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError) as refusal:
        read_header(path)
    assert message in str(refusal.value) and "model.safetensors" in str(refusal.value)


@pytest.mark.parametrize("length", [17, 2**63, 200_000_000])
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"found a header of {length} bytes in a file of 18"):
        read_header(write(tmp_path / "model.safetensors", b"{}        ", length=length))


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match="in a file of 1, expected one that fits"):
        read_header(tmp_path / "model.safetensors")


def test_a_cut_file_is_refused_before_it_is_read(folder: Folder) -> None:
    folder.save()
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    folder.assert_refused("model.safetensors: found", "bytes of data, expected")


def shard(folder: Folder) -> dict[str, str]:
    """The folder's tensors in two files, and the index's map."""
    folder.save()
    (folder.path / "model.safetensors").unlink()
    names = sorted(folder.tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: folder.tensors[name] for name in held}, folder.path / file)
    return {name: file for file, held in parts.items() for name in held}


def write_index(folder: Folder, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder.path / "model.safetensors.index.json").write_text(text)


def test_shards_load(folder: Folder) -> None:
    write_index(folder, shard(folder))
    folder.assert_loads()


def test_a_missing_shard_is_refused(folder: Folder) -> None:
    write_index(folder, shard(folder))
    (folder.path / "b.safetensors").unlink()
    folder.assert_refused("index.json: lists 'b.safetensors', expected a file of the same folder")


def test_a_shard_outside_the_folder_is_refused(folder: Folder) -> None:
    write_index(folder, {**shard(folder), "model.norm.weight": "../model/a.safetensors"})
    folder.assert_refused("lists '../model/a.safetensors', expected a file of the same folder")


def test_a_tensor_in_another_shard_than_said_is_refused(folder: Folder) -> None:
    where = shard(folder)
    write_index(folder, {**where, "model.norm.weight": "a.safetensors"})
    assert where["model.norm.weight"] == "b.safetensors"
    folder.assert_refused("tensor 'model.norm.weight' found in b.safetensors, expected in a.safetensors")


@pytest.mark.parametrize("change", ["add", "drop"])
def test_an_index_that_disagrees_with_its_shards_is_refused(folder: Folder, change: str) -> None:
    where = shard(folder)
    if change == "add":
        write_index(folder, {**where, "more": "a.safetensors"})
        folder.assert_refused("index.json: tensor 'more' found in no shard, expected in a.safetensors")
    else:
        write_index(folder, {name: file for name, file in where.items() if name != "model.norm.weight"})
        folder.assert_refused("tensor 'model.norm.weight' found in b.safetensors, expected in none")


def test_a_tensor_in_two_shards_is_refused(folder: Folder) -> None:
    where = shard(folder)
    save_file({**folder.tensors}, folder.path / "a.safetensors")
    write_index(folder, where)
    folder.assert_refused("b.safetensors: tensor", "found in a.safetensors too, expected once")


@pytest.mark.parametrize("weight_map", [None, [1], {}, {"model.norm.weight": 3}])
def test_an_index_of_another_shape_is_refused(folder: Folder, weight_map: object) -> None:
    shard(folder)
    write_index(folder, weight_map)
    folder.assert_refused("index.json")


def test_pickles_are_refused(folder: Folder) -> None:
    folder.save()
    (folder.path / "model.safetensors").unlink()
    folder.assert_refused("found neither, expected model.safetensors or model.safetensors.index.json")
    torch.save(folder.tensors, folder.path / "pytorch_model.bin")
    folder.assert_refused("only pytorch_model.bin, and pickles can run any code", "expected model.safetensors")
