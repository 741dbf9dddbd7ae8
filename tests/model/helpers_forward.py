"""A hand-made paged forward pass: the engine's runner in its plainest form, for tests of the network alone."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from model.cache.store import PagedStore
from model.nn.attention import PagedAttention
from model.nn.batch import TILE, AttentionGroup, ForwardBatch, pad_rows
from model.nn.decoder import Decoder

CPU = torch.device("cpu")
ROWS = 16  # enough for float32 products on any processor seen


class Paged:
    """Some sequences over one paged cache; their blocks are shuffled, so that order can't be mistaken for layout."""

    def __init__(self, decoder: Decoder, num_seqs: int, max_len: int, block_size: int = 16) -> None:
        self.decoder, self.size = decoder, block_size
        each = -(-max_len // block_size)
        self.store = PagedStore(decoder.config, num_seqs * each + 1, block_size, CPU, torch.float32)
        shuffled = torch.randperm(num_seqs * each, generator=torch.Generator().manual_seed(0)) + 1
        self.tables = shuffled.view(num_seqs, each).tolist()
        self.lengths = [0] * num_seqs

    @torch.inference_mode()
    def forward(self, chunks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Append new ids to sequences, all in one pass -> the logits [new ids, vocab] of each."""
        rows: dict[int, list[int]] = {}
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for seq, new in chunks.items():
            rows[seq] = list(range(len(ids), len(ids) + len(new)))
            ids += new
            for at in range(self.lengths[seq], self.lengths[seq] + len(new)):
                positions.append(at)
                slots.append(self.tables[seq][at // self.size] * self.size + at % self.size)
            self.lengths[seq] += len(new)
        order = sorted(chunks, key=lambda seq: (len(chunks[seq]), -self.lengths[seq]))
        groups = [self._group(list(g), rows) for _, g in groupby(order, key=lambda seq: len(chunks[seq]))]
        batch = ForwardBatch(
            token_ids=pad_rows(torch.tensor(ids), ROWS),
            positions=pad_rows(torch.tensor(positions), ROWS),
            num_rows=len(ids),
            slots=torch.tensor(slots),
            groups=tuple(groups),
            logit_rows=torch.arange(len(ids)),
            attention_rows=ROWS,
        )
        ops = PagedAttention(self.decoder.config, self.store, batch)
        logits = self.decoder.logits(self.decoder(batch.token_ids, batch.positions, ops), ops)
        return {seq: logits[rows[seq]] for seq in chunks}

    def _group(self, seqs: list[int], rows: Mapping[int, list[int]]) -> AttentionGroup:
        tiles = [-(-self.lengths[seq] // TILE) for seq in seqs]
        width = tiles[0] * TILE // self.size
        return AttentionGroup(
            rows=torch.tensor([rows[seq] for seq in seqs]),
            block_tables=torch.tensor([(self.tables[seq] + [0] * width)[:width] for seq in seqs]),
            live=tuple(sum(n > tile for n in tiles) for tile in range(tiles[0])),
            min_position=min(self.lengths[seq] - len(rows[seq]) for seq in seqs),
        )


def in_chunks(decoder: Decoder, ids: Sequence[int], widths: Sequence[int]) -> Tensor:
    """Logits [len(ids), vocab] of one sequence computed in chunks of the given widths, the last one repeating."""
    paged, parts, at = Paged(decoder, 1, len(ids)), [], 0
    for step in range(len(ids)):
        if at >= len(ids):
            break
        width = widths[min(step, len(widths) - 1)]
        parts.append(paged.forward({0: ids[at : at + width]})[0])
        at += width
    return torch.cat(parts)
