"""A folder of safetensors -> a filled network: every tensor used once, every parameter filled, or a refusal.

Headers are checked here, byte for byte, before the safetensors library reads any data; pickles are never opened. The
format is the one of the safetensors README (https://github.com/huggingface/safetensors). Knows no family by name.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.config import CheckpointError, ModelConfig
from model.families.base import Family, Rule
from model.families.fields import Fields, read_json
from model.families.registry import FAMILIES
from model.nn.bert import Encoder
from model.nn.decoder import Decoder
from model.nn.quantized import QUANTIZED, quantize_weight, replace_layers

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file's header describes it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name!r}"


def load_decoder(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, quantized: bool = False
) -> Decoder:
    """The same for a folder that must hold a decoder."""
    network = load_network(folder, config, dtype, device, quantized)
    if not isinstance(network, Decoder):
        raise CheckpointError(f"{folder}: found an encoder ({config.family}), expected a decoder")
    return network


def load_network(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, quantized: bool = False
) -> Decoder | Encoder:
    """The network of a model folder, in evaluation mode, without gradients; `quantized`: with int8 weights. Raises
    CheckpointError in one line.

    One tensor more than the network itself is in memory at a time; nothing stays mapped to the files.
    """
    family = FAMILIES[config.family]
    source, entries = _stored(folder)
    stored = _without_prefix(entries, family)
    rules = family.rules(config)
    _check_names(source, stored, rules, family, config)
    for rule in rules:
        _check_entries(rule, [stored[name.removeprefix(family.prefix)] for name in rule.theirs])
    with torch.device("meta"), _Unfilled():
        network = Decoder(config) if config.role == "decoder" else Encoder(config)
        if quantized:
            replace_layers(network, config.tied_head and config.role == "decoder", dtype)
    state, narrow = {}, {name for name, layer in network.named_modules() if isinstance(layer, QUANTIZED)}
    with _Reader() as reader:
        for rule in rules:
            parts = [reader.read(stored[name.removeprefix(family.prefix)]) for name in rule.theirs]
            # Always a copy: a parameter must not live in a mapped file that somebody may replace or cut.
            whole = torch.cat([part.t() if rule.transpose else part for part in parts]).contiguous()
            layer, _, kind = rule.ours.rpartition(".")
            if layer in narrow and kind == "weight":
                narrowed = quantize_weight(whole)
                state[f"{layer}.numbers"] = narrowed.numbers.to(device)
                state[f"{layer}.scales"] = narrowed.scales.to(device)
                continue
            state[rule.ours] = whole.to(device, dtype)
            if dtype == torch.float16 and not state[rule.ours].isfinite().all():
                found = f"{rule.theirs[0]!r} up to {whole.abs().max():g}"
                raise CheckpointError(f"{source}: tensor {found}, expected at most 65504 for float16")
        _check_tied(reader, stored, family, config)
    network.load_state_dict(state, assign=True)
    return network.to(device).eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Turns torch's initialisers into nothing: on the meta device they do nothing either, but their first use imports
    a second's worth of modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _Reader(ExitStack):
    """The safetensors files of one folder, opened when first read."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, safe_open] = {}

    def read(self, entry: Entry) -> Tensor:
        """A tensor on the CPU; refused when it holds NaN or infinity."""
        try:
            if entry.path not in self._files:
                self._files[entry.path] = self.enter_context(safe_open(entry.path, framework="pt"))
            tensor: Tensor = self._files[entry.path].get_tensor(entry.name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry}: can't be read ({error})") from error
        if not tensor.isfinite().all():
            found = f"{tensor.numel() - int(tensor.isfinite().sum())} of {tensor.numel()} numbers are NaN or infinite"
            raise CheckpointError(f"{entry}: {found}, expected finite ones")
        return tensor


def _stored(folder: Path) -> tuple[Path, dict[str, Entry]]:
    """The file that lists the folder's tensors, and the tensors by name. One file goes before an index, as in
    transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return single, read_header(single)
    if index.is_file():
        return index, _sharded(folder, index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    found = f"only {pickles[0]}, and pickles can run any code" if pickles else "neither"
    raise CheckpointError(f"{folder}: found {found}, expected model.safetensors or {index.name}")


def _sharded(folder: Path, index: Path) -> dict[str, Entry]:
    """The tensors of all shards, which must be where the index says."""
    where = (Fields(read_json(index), str(index)).section("weight_map") or Fields({}, str(index))).raw
    entries: dict[str, Entry] = {}
    for file in sorted({str(file) for file in where.values()}):
        if Path(file).name != file or not (folder / file).is_file():
            raise CheckpointError(f"{index}: lists {file!r}, expected a file of the same folder")
        for name, entry in read_header(folder / file).items():
            if name in entries:
                raise CheckpointError(f"{entry}: found in {entries[name].path.name} too, expected once")
            entries[name] = entry
    for name in sorted(where.keys() | entries.keys()):
        found = entries[name].path.name if name in entries else "no shard"
        if where.get(name) != found:
            raise CheckpointError(f"{index}: tensor {name!r} found in {found}, expected in {where.get(name, 'none')}")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, when they fill it without gap, overlap or rest. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fits = size >= 8 and length <= min(HEADER_LIMIT_BYTES, size - 8)
            raw = json.loads(file.read(length), object_pairs_hook=_once) if fits else None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: bad header ({error})") from error
    if not fits:
        raise CheckpointError(f"{path}: found a header of {length} bytes in a file of {size}, expected one that fits")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: bad header, expected a JSON object")
    entries, spans = {}, []
    for name, value in raw.items():
        if name != "__metadata__":
            entries[name], begin, end = _entry(path, name, value)
            spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{path}: tensor {name!r} found at byte {begin} of the data, expected at {at}")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(f"{path}: found {size - 8 - length} bytes of data, expected {at} (cut or overlong file)")
    return entries


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return dict(pairs)


def _entry(path: Path, name: str, value: object) -> tuple[Entry, int, int]:
    """One tensor of a header, and where in the data it begins and ends."""
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(n) is int and n >= 0 for n in (*shape, begin, end)
        ):
            entry = Entry(path, name, dtype, tuple(shape))
        case _:
            raise CheckpointError(f"{path}: tensor {name!r}: expected dtype, shape and data_offsets in its header")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{entry}: dtype {dtype!r}, expected one of {', '.join(FLOATS)}")
    if end - begin != ITEM_BYTES[dtype] * math.prod(shape):
        expected = f"{ITEM_BYTES[dtype] * math.prod(shape)} for {dtype} of shape {shape}"
        raise CheckpointError(f"{entry}: found {end - begin} bytes, expected {expected}")
    return entry, begin, end


def _without_prefix(entries: Mapping[str, Entry], family: Family) -> dict[str, Entry]:
    stored: dict[str, Entry] = {}
    for name, entry in entries.items():
        short = name.removeprefix(family.prefix)
        for old, new in family.aliases.items():
            short = short.removesuffix(old) + new if short.endswith(old) else short
        if short in stored:
            raise CheckpointError(f"{entry}: found with and without {family.prefix!r} before it, expected once")
        stored[short] = entry
    return stored


def _check_names(
    source: Path, stored: Mapping[str, Entry], rules: tuple[Rule, ...], family: Family, config: ModelConfig
) -> None:
    """Every tensor that the rules name is there, and no other but derived buffers and a copy of a tied head."""
    wanted = {name.removeprefix(family.prefix): name for rule in rules for name in rule.theirs}
    missing = [name for short, name in wanted.items() if short not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{source}: tensor {missing[0]!r}{more} not found, expected by config.json ({family.name})"
        )
    allowed = (*family.derived, re.escape(_head(family))) if config.tied_head else family.derived
    extra = [e for name, e in stored.items() if name not in wanted and not any(re.fullmatch(p, name) for p in allowed)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{extra[0]}{more} found, expected by nothing in config.json ({family.name})")


def _check_entries(rule: Rule, entries: list[Entry]) -> None:
    """The tensors of one rule have its shapes and a dtype of ours."""
    for shape, entry in zip(rule.shapes(), entries, strict=True):
        if entry.shape != shape:
            raise CheckpointError(f"{entry}: shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{entry}: dtype {entry.dtype}, expected one of {', '.join(FLOATS)}")


def _head(family: Family) -> str:
    return f"{family.names['head'][0]}.weight"


def _check_tied(reader: _Reader, stored: Mapping[str, Entry], family: Family, config: ModelConfig) -> None:
    """Some folders store a tied head a second time; it must be the same, or the config is wrong."""
    copy = stored.get(_head(family)) if config.tied_head else None
    embedding = stored[f"{family.names['embed'][0]}.weight".removeprefix(family.prefix)]
    if copy is not None and not torch.equal(reader.read(copy), reader.read(embedding)):
        raise CheckpointError(f"{copy}: differs from {embedding.name}, expected equal (tied in config.json)")
