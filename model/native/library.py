"""The core as a Python object: finding and loading the library, and the structs of `core.h`, mirrored field by field.

It knows pointers and numbers; what they mean to a network is `packing.py`'s business.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from model.native.build import HERE, TARGETS, file_name

PANEL = 48
FLOAT32, BFLOAT16, INT8 = range(3)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROWS_FLOAT32, ROWS_BFLOAT16, IN_HEAD = range(3)


def _fields(**kinds: str) -> list[tuple[str, type]]:
    """Fields of a struct by C type."""
    types = {"pointer": c_void_p, "int": c_int32, "long": c_int64, "float": c_float}
    return [(name, types[kind]) for kind, names in kinds.items() for name in names.split()]


class Linear(Structure):
    """A packed matrix."""

    _fields_ = _fields(pointer="weights scales sums bias", int="num_in num_out")


class Norm(Structure):
    """A norm's numbers."""

    _fields_ = _fields(pointer="weight bias")


class Layer(Structure):
    """One layer, with its part of the cache."""

    _fields_ = [
        ("attn_norm", Norm),
        ("mlp_norm", Norm),
        *_fields(pointer="q_norm k_norm"),
        *((name, Linear) for name in ("qkv", "out", "up", "down")),
        *_fields(pointer="keys values", long="window"),
    ]


class Network(Structure):
    """The whole network."""

    _fields_ = [
        *_fields(
            int="precision cache_bfloat16 embed_kind activation gated num_layers hidden num_heads num_kv_heads "
            "head_dim inner vocab block_size num_blocks max_rows max_len",
            float="eps",
            pointer="embed positions cosine sine",
        ),
        ("norm", Norm),
        ("head", Linear),
        ("layers", POINTER(Layer)),
    ]


class Step(Structure):
    """One step's rows and where its results go."""

    _fields_ = _fields(
        int="num_rows num_chunks num_wanted num_told",
        pointer="ids chunks tables wanted logits best finite told hidden",
    )


@cache
def load(folder: Path = HERE, target: str | None = None) -> ctypes.CDLL | None:
    """The library for this processor, or the one for `target`; None: it has not been built."""
    if target is None:
        lowest = load(folder, next(iter(TARGETS)))
        if lowest is None:
            return None
        target = list(TARGETS)[lowest.millrace_level()]
    path = folder / file_name(target)
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    library.millrace_level.restype = c_int
    library.millrace_open.argtypes, library.millrace_open.restype = [POINTER(Network), c_int], c_void_p
    library.millrace_step.argtypes, library.millrace_step.restype = [c_void_p, POINTER(Step)], None
    library.millrace_close.argtypes, library.millrace_close.restype = [c_void_p], None
    return library
