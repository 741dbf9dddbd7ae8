"""One pass through Triton kernels: `Ops` for a GPU. It decides shapes and grids; the kernels beside it compute.

What no kernel covers (LayerNorm, other activations than SiLU) goes the plain way.
"""

import math

import torch
import triton
from torch import Tensor, nn

from model.cache.store import PagedStore
from model.config import ModelConfig
from model.nn.batch import ROWS_PER_PIECE, RaggedBatch
from model.nn.kernels.attention import attend_chunk, attend_one, merge_spans
from model.nn.kernels.linear import FIXED, linear
from model.nn.kernels.rows import add_rms_norm, finish_heads, silu_gate
from model.nn.norm import RMSNorm
from model.nn.ops import Heads, Ops, Weight
from model.nn.quantized import Int8Weight

TILE = 64  # keys reduced at once
GATE_STEP = 1024
LEAST_DOT = 16  # the smallest side of a tile in a Triton product


class KernelOps(Ops):
    """The operations of one ragged batch over the paged cache. `fixed`: matrix products by the kernel whose rows do
    not depend on their number, instead of the library's."""

    def __init__(self, config: ModelConfig, store: PagedStore, batch: RaggedBatch, fixed: bool = False) -> None:
        self.config, self.store, self.batch, self.fixed = config, store, batch, fixed

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Int8Weight):
            return linear(x, weight.numbers, bias, weight.scales, FIXED if self.fixed else None)
        return linear(x, weight, bias) if self.fixed else super().linear(x, weight, bias)

    def add_norm(self, x: Tensor, update: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        if not isinstance(norm, RMSNorm):
            return super().add_norm(x, update, norm)
        n, size = x.shape
        summed, normed = x if update is None else torch.empty_like(x), torch.empty_like(x)
        pad = triton.next_power_of_2(size)
        add_rms_norm[(n,)](
            x, update, norm.weight, summed, normed, norm.eps, size, pad, update is not None, num_warps=_warps(pad)
        )  # fmt: skip
        return summed, normed

    def gate(self, h: Tensor, activation: str) -> Tensor:
        if activation != "silu":
            return super().gate(h, activation)
        n, size = h.shape[0], h.shape[1] // 2
        out = h.new_empty(n, size)
        silu_gate[(n, triton.cdiv(size, GATE_STEP))](h, out, size, GATE_STEP, num_warps=4)
        return out

    def attend(self, layer: int, heads: Heads) -> Tensor:
        queries = self._finish(layer, heads)
        mixed = torch.empty_like(queries)
        if self.batch.num_single:
            self._attend_singles(layer, queries, mixed)
        if len(self.batch.pieces):
            self._attend_pieces(layer, queries, mixed)
        return mixed

    def _finish(self, layer: int, heads: Heads) -> Tensor:
        """Queries [n, heads, d]; the keys and values are in the cache."""
        n, total, dim = heads.qkv.shape
        queries = heads.qkv.new_empty(n, heads.num_heads, dim)
        q_norm, k_norm = heads.q_norm, heads.k_norm
        cos, sin = heads.angles if heads.angles is not None else (None, None)
        keys, values = self.store.keys[layer], self.store.values[layer]
        finish_heads[(n, total)](
            heads.qkv,
            queries,
            keys,
            values,
            self.batch.slots,
            cos,
            sin,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
            0.0 if q_norm is None else q_norm.eps,
            keys.stride(0),
            heads.num_heads,
            heads.num_kv_heads,
            dim,
            triton.next_power_of_2((dim + 1) // 2),
            q_norm is not None,
            heads.angles is not None,
            num_warps=1,
        )
        return queries

    def _attend_singles(self, layer: int, queries: Tensor, mixed: Tensor) -> None:
        batch, (_, num_heads, dim) = self.batch, queries.shape
        n, kv_heads = batch.num_single, self.config.num_kv_heads
        keys, values = self.store.keys[layer], self.store.values[layer]
        window, dim_pad = self.config.window(layer) or 0, max(LEAST_DOT, triton.next_power_of_2(dim))
        shared = num_heads // kv_heads
        sums = queries.new_empty(n, num_heads, batch.num_spans, dim, dtype=torch.float32)
        peaks = queries.new_empty(n, num_heads, batch.num_spans, dtype=torch.float32)
        totals = torch.empty_like(peaks)
        attend_one[(n, kv_heads, batch.num_spans)](
            queries,
            keys,
            values,
            batch.tables,
            batch.seats,
            batch.positions,
            sums,
            peaks,
            totals,
            keys.stride(0),
            batch.tables.stride(0),
            _scale(dim),
            kv_heads,
            shared,
            max(LEAST_DOT, triton.next_power_of_2(shared)),
            window,
            batch.span,
            self.store.block_size,
            TILE,
            dim,
            dim_pad,
            _precision(queries),
            num_warps=4,
            num_stages=_stages(queries, dim_pad),
        )
        merge_spans[(n, num_heads)](
            sums,
            peaks,
            totals,
            batch.positions,
            mixed,
            batch.num_spans,
            num_heads,
            window,
            batch.span,
            dim,
            dim_pad,
            num_warps=1,
        )

    def _attend_pieces(self, layer: int, queries: Tensor, mixed: Tensor) -> None:
        batch, (_, num_heads, dim) = self.batch, queries.shape
        kv_heads = self.config.num_kv_heads
        keys, values = self.store.keys[layer], self.store.values[layer]
        dim_pad, shared = max(LEAST_DOT, triton.next_power_of_2(dim)), num_heads // kv_heads
        attend_chunk[(len(batch.pieces), kv_heads)](
            queries,
            keys,
            values,
            batch.tables,
            batch.pieces,
            mixed,
            keys.stride(0),
            batch.tables.stride(0),
            _scale(dim),
            kv_heads,
            shared,
            max(ROWS_PER_PIECE, triton.next_power_of_2(shared)),
            self.config.window(layer) or 0,
            batch.span,
            self.store.block_size,
            TILE,
            dim,
            dim_pad,
            _precision(queries),
            num_warps=4,
            num_stages=_stages(queries, dim_pad),
        )


def _scale(dim: int) -> float:
    return math.log2(math.e) / math.sqrt(dim)  # the kernels count in powers of 2


def _precision(like: Tensor) -> str:
    return "ieee" if like.dtype == torch.float32 else "tf32"  # 16-bit types use neither


def _stages(like: Tensor, dim_pad: int) -> int:
    # With three, keys, values and the block numbers behind them are fetched while a tile is computed. Wider heads than
    # that do not fit into the shared memory of smaller GPUs so often.
    return 3 if dim_pad * like.dtype.itemsize <= 256 else 1


def _warps(pad: int) -> int:
    return max(1, min(16, pad // 512))
