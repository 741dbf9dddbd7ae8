"""A paged cache with shuffled blocks and random contents, and batches over it in both shapes: ragged and grouped."""

from collections.abc import Mapping
from itertools import groupby

import torch

from model.cache.store import PagedStore
from model.config import ModelConfig
from model.nn.batch import TILE, AttentionGroup, ForwardBatch, RaggedBatch, piece_rows
from tests.model.helpers_kernels import DEVICE

SIZE = 16
SPAN = 256
Chunks = Mapping[int, tuple[int, int]]  # sequence -> position of its first new row, number of rows


class Cache:
    """`num_seqs` sequences of up to `max_len` tokens; block 0 is nobody's."""

    def __init__(self, config: ModelConfig, num_seqs: int, max_len: int, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.num_seqs = config, num_seqs
        each = -(-max_len // SIZE)
        self.store = PagedStore(config, num_seqs * each + 1, SIZE, DEVICE, dtype)
        random = torch.Generator().manual_seed(1)
        for cache in (self.store.keys, self.store.values):
            cache.copy_(torch.randn(cache.shape, generator=random))
        self.tables = (torch.randperm(num_seqs * each, generator=random) + 1).view(num_seqs, each)

    def in_order(self, chunks: Chunks) -> list[tuple[int, int]]:
        return [chunks[seq] for seq in order(chunks)]

    def last_row(self, chunks: Chunks, seq: int) -> int:
        names = order(chunks)
        return sum(chunks[name][1] for name in names[: names.index(seq) + 1]) - 1

    def slots(self, chunks: Chunks) -> list[int]:
        return [
            int(self.tables[seq, at // SIZE]) * SIZE + at % SIZE
            for seq in order(chunks)
            for at in range(chunks[seq][0], sum(chunks[seq]))
        ]

    def as_float32(self) -> PagedStore:
        """A copy for the twin."""
        copy = PagedStore(self.config, self.store.num_blocks, SIZE, DEVICE, torch.float32)
        copy.keys.copy_(self.store.keys)
        copy.values.copy_(self.store.values)
        return copy

    def poison_beyond(self, chunks: Chunks) -> None:
        """NaN in every slot that no row of `chunks` may see."""
        seen = torch.zeros(self.store.num_blocks * SIZE, dtype=torch.bool)
        for seq, (start, num) in chunks.items():
            at = torch.arange(start + num)
            seen[self.tables[seq, at // SIZE] * SIZE + at % SIZE] = True
        for cache in (self.store.keys, self.store.values):
            cache.flatten(2, 3)[:, :, ~seen.to(DEVICE)] = torch.nan

    def forward_batch(self, chunks: Chunks) -> ForwardBatch:
        """The same rows for `PagedAttention`."""
        names, first, groups = order(chunks), {}, []
        for seq in names:
            first[seq] = sum(chunks[name][1] for name in names[: names.index(seq)])
        by_width = sorted(names, key=lambda seq: (chunks[seq][1], -chunks[seq][0]))
        for num, members in groupby(by_width, key=lambda seq: chunks[seq][1]):
            group = list(members)
            tiles = [-(-sum(chunks[seq]) // TILE) for seq in group]
            tables = torch.zeros(len(group), tiles[0] * TILE // SIZE, dtype=torch.int64)
            for i, seq in enumerate(group):
                known = self.tables[seq, : tables.shape[1]]
                tables[i, : len(known)] = known
            groups.append(
                AttentionGroup(
                    rows=torch.tensor([[first[seq] + i for i in range(num)] for seq in group]).to(DEVICE),
                    block_tables=tables.to(DEVICE),
                    live=tuple(sum(n > tile for n in tiles) for tile in range(tiles[0])),
                    min_position=min(chunks[seq][0] for seq in group),
                )
            )
        batch = ragged(self, chunks)
        return ForwardBatch(
            batch.token_ids, batch.positions, len(batch.token_ids), batch.slots, tuple(groups), batch.positions[:0], 1
        )


def order(chunks: Chunks) -> list[int]:
    """Sequences with one row first."""
    return sorted(chunks, key=lambda seq: (chunks[seq][1] > 1, seq))


def ragged(cache: Cache, chunks: Chunks, num_padding: int = 0) -> RaggedBatch:
    """Rows in `order`, then rows of padding."""
    positions, seats, pieces = list[int](), list[int](), list[list[int]]()
    width = piece_rows(cache.config.num_heads, cache.config.num_kv_heads)
    for seq in order(chunks):
        start, num = chunks[seq]
        if num > 1:
            for at in range(0, num, width):
                pieces.append([seq, len(positions) + at, min(width, num - at), start + at])
        positions += range(start, start + num)
        seats += [seq] * num
    pad = [0] * num_padding
    longest = max(sum(chunk) for chunk in chunks.values())
    return RaggedBatch(
        token_ids=torch.zeros(len(positions) + num_padding, dtype=torch.int64, device=DEVICE),
        positions=torch.tensor(positions + pad, device=DEVICE),
        slots=torch.tensor([*cache.slots(chunks), *[-1] * num_padding], device=DEVICE),
        seats=torch.tensor(seats + pad, device=DEVICE),
        num_single=sum(num == 1 for _, num in chunks.values()),
        pieces=torch.tensor(pieces, dtype=torch.int32, device=DEVICE).view(-1, 4),
        tables=cache.tables.to(DEVICE, torch.int32),
        span=SPAN,
        num_spans=-(-longest // SPAN),
    )
