"""What one forward pass over the paged cache is told: everything it needs, and nothing global.

Rows are tokens. Their number is padded to a fixed multiple (see `rows.py`); only the first `num_rows` are real.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kinds import Kind

TILE = 128
"""Keys reduced at once by attention. Fixed, so that a sequence's sums are grouped the same way in every batch."""


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences that compute the same number of new tokens in this step, longest context first.

    `rows` [b, q] points at their rows in the batch; `block_tables` [b, num_tiles * TILE / block_size] is padded with
    block 0; `live[t]` is the number of sequences (a prefix of the group) whose context reaches into tile `t`.
    """

    rows: Tensor
    block_tables: Tensor
    live: tuple[int, ...]
    min_position: int  # of any row in the group: lets sliding windows skip tiles
    states: tuple[int, ...] = ()  # of each sequence the slot, where networks keep more than blocks


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the rows of a group find the keys that one kind of layer lets them see: in `tiles` [b, n], -1 where a
    sequence has fewer, of blocks `tables` [b, n * TILE / block_size]. `kept` [b, t, num_random] are the rows' random
    blocks. A block that the sequence has given back stands as 0: what is in it is masked."""

    tiles: Tensor
    tables: Tensor
    kept: Tensor


@dataclass(frozen=True, slots=True)
class StreamGroup:
    """Sequences that compute the same number of new tokens: `rows`, `positions` [b, t]. Their states are in `slots`
    [b], but for those of `is_new` [b], which begin. `starts` are the first positions, as numbers."""

    rows: Tensor
    positions: Tensor
    slots: Tensor
    is_new: Tensor
    starts: tuple[int, ...]
    reaches: Mapping[Kind, Reach]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step. `token_ids`, `positions` are int64 [padded rows]; `slots` int64 [num_rows] are flat cache positions
    (block * block_size + offset); `logit_rows` int64 [m] are the rows whose logits are wanted. `attention_rows` is the
    multiple that attention pads each sequence's query rows to. `groups` are for full attention, `streams` for all other
    kinds of layers, whose own products have a multiple of `stream_rows` rows."""

    token_ids: Tensor
    positions: Tensor
    num_rows: int
    slots: Tensor
    groups: tuple[AttentionGroup, ...]
    logit_rows: Tensor
    attention_rows: int
    streams: tuple[StreamGroup, ...] = ()
    stream_rows: int = 1


ROWS_PER_PIECE = 64
"""Query rows, times the heads that share a kv head, that one program of the chunk kernel takes."""


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """One step for kernels that find their own way through the cache.

    `token_ids`, `positions`, `slots`, `seats` are int64 [n]; a seat is a row's line in `tables` int32 [seats, width],
    which lists the blocks of its sequence. The first `num_single` rows attend by themselves; the others belong to
    `pieces` int32 [m, 4] of neighbouring rows of one sequence: seat, first row, number of rows, first position. A row
    with slot -1 is padding. No context reaches beyond `num_spans` spans of `span` keys.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    seats: Tensor
    num_single: int
    pieces: Tensor
    tables: Tensor
    span: int
    num_spans: int


def piece_rows(num_heads: int, num_kv_heads: int) -> int:
    """Rows of one sequence in one piece."""
    return max(1, ROWS_PER_PIECE * num_kv_heads // num_heads)


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Zero rows appended until the first dimension is a multiple of `multiple`."""
    missing = -x.shape[0] % multiple
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
