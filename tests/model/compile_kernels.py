"""Compile every kernel for a GPU that need not be here, and print what it takes: `python -m tests.model.compile_kernels
80 90`. Real shapes in bfloat16; a kernel that does not compile, or asks for more shared memory than there is, ends
this with an error. It must run without TRITON_INTERPRET.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.nn.kernels.attention import attend_chunk, attend_one, merge_spans
from model.nn.kernels.linear import FEW, FIXED, MANY, Tile, tiled_linear
from model.nn.kernels.rows import add_rms_norm, finish_heads, silu_gate

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
BF16, F32, I64, I32, SCALE, COUNT = "*bf16", "*fp32", "*i64", "*i32", "fp32", "i32"
ATTENTION = {"SPAN": 256, "BLOCK": 16, "TILE": 64, "PRECISION": "tf32"}
CACHE = {"keys": BF16, "values": BF16, "tables": I32, "head_stride": COUNT, "table_width": COUNT, "scale": SCALE}


def attention_kernels(
    dim: int, shared: int, stages: int, window: int = 0
) -> list[tuple[Any, dict[str, str], dict[str, Any], Any]]:
    """Kernels, types of arguments, constants and options for one head size."""
    sizes = {
        "NUM_KV_HEADS": 8,
        "SHARED": shared,
        "DIM": dim,
        "DIM_PAD": triton.next_power_of_2(dim),
        "WINDOW": window,
        **ATTENTION,
    }
    parts = {"sums": F32, "peaks": F32, "totals": F32, "positions": I64}
    rows = {"qkv": BF16, "queries": BF16, "slots": I64, "cos": BF16, "sin": BF16, "q_weight": BF16, "k_weight": BF16}
    one = {"queries": BF16, "seats": I64, **CACHE, **parts}
    heads = {"NUM_HEADS": 8 * shared, "NUM_KV_HEADS": 8, "DIM": dim, "HALF_PAD": triton.next_power_of_2(dim // 2)}
    merging = {name: sizes[name] for name in ("WINDOW", "SPAN", "DIM", "DIM_PAD")}
    merging["NUM_HEADS"] = 8 * shared
    options = {"num_warps": 4, "num_stages": stages}
    return [
        (attend_one, one, {**sizes, "SHARED_PAD": 16}, options),
        (merge_spans, {**parts, "mixed": BF16, "num_spans": COUNT}, merging, {"num_warps": 1}),
        (attend_chunk, {"queries": BF16, "pieces": I32, "mixed": BF16, **CACHE}, {**sizes, "ROWS_PAD": 64}, options),
        (
            finish_heads,
            {**rows, "keys": BF16, "values": BF16, "eps": SCALE, "head_stride": COUNT},
            {**heads, "NORM": True, "TURN": True},
            {"num_warps": 1},
        ),
    ]  # fmt: skip


def row_kernels() -> list[tuple[Any, dict[str, str], dict[str, Any], Any]]:
    norm = dict.fromkeys(("x", "update", "weight", "summed", "normed"), BF16)
    product = {"x": BF16, "bias": BF16, "scales": F32, "out": BF16, "num_rows": COUNT, "num_columns": COUNT}

    def by_tiles(tile: Tile, scaled: bool) -> tuple[Any, dict[str, str], dict[str, Any], Any]:
        shape = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "DEEP": 4096}
        constants = {**shape, "BIASED": True, "SCALED": scaled, "PRECISION": "tf32"}
        types = {**product, "weight": "*i8" if scaled else BF16}
        return tiled_linear, types, constants, {"num_warps": 4, "num_stages": 4}

    return [
        (add_rms_norm, {**norm, "eps": SCALE}, {"SIZE": 4096, "PAD": 4096, "ADD": True}, {"num_warps": 8}),
        (silu_gate, {"h": BF16, "out": BF16}, {"SIZE": 14336, "STEP": 1024}, {"num_warps": 4}),
        by_tiles(FIXED, scaled=False),
        *(by_tiles(tile, scaled=True) for tile in (FIXED, FEW, MANY)),
    ]


def main() -> None:
    jobs = [
        *row_kernels(),
        *attention_kernels(128, 4, 3),
        *attention_kernels(80, 8, 3, 1000),
        *attention_kernels(256, 4, 1),
    ]
    for capability in map(int, sys.argv[1:]):
        for kernel, types, constants, options in jobs:
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            # As when launched: addresses and sizes that are multiples of 16 let loads be wide and run ahead.
            known = {
                (i,): [["tt.divisibility", 16]]
                for i, t in enumerate(signature.values())
                if t not in (SCALE, "constexpr")
            }
            source = ASTSource(kernel, signature, constexprs=constants, attrs=known)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            shared = built.metadata.shared
            limit = SHARED_BYTES[capability]
            ahead = built.asm["ptx"].count("cp.async.c")
            dim = constants.get("DIM", "-")
            print(
                f"sm_{capability} {kernel.__name__:13s} dim {dim!s:>3}: {shared:6d} bytes shared, {ahead} loads ahead"
            )
            assert shared <= limit, f"{shared} bytes of shared memory, and sm_{capability} has {limit}"


if __name__ == "__main__":
    main()
