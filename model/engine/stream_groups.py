"""A plan's chunks as the layers with a past of constant size want them: slots of states, and the few tiles of keys that
each kind looks at. It knows no network but for which tiles its kinds look at."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from model.engine.scheduler import Chunk
from model.engine.sequence import HOLE
from model.kinds import Kind
from model.nn.batch import TILE, Reach, StreamGroup
from model.nn.decoder import Decoder
from model.nn.ops import Look


class StreamGroups:
    """For one network. `kinds` are those that are not attention to everything; `has_full`: some layers are;
    `has_blocks`: some layers have keys in blocks."""

    def __init__(self, decoder: Decoder, block_size: int, device: torch.device) -> None:
        config = decoder.config
        each = [config.kind(layer) for layer in range(config.num_layers)]
        self.kinds: Seq[Kind] = [kind for kind in dict.fromkeys(each) if not kind.is_full]
        self.has_full, self.has_blocks = any(kind.is_full for kind in each), bool(config.cached_layers)
        self._looks: Mapping[Kind, Look] = {
            kind: cast(Look, layer.attn) for kind, layer in zip(each, decoder.layers, strict=True) if kind.scores_some
        }
        self._per_tile, self._device = TILE // block_size, device

    def group(self, chunks: list[Chunk], first_rows: Mapping[int, int]) -> StreamGroup:
        """Chunks of equal width; `first_rows` are their rows in the batch by the chunk's `id`."""
        width, starts = chunks[0].num_tokens, tuple(chunk.start for chunk in chunks)
        return StreamGroup(
            rows=self._tensor([range(first := first_rows[id(chunk)], first + width) for chunk in chunks]),
            positions=self._tensor([range(start, start + width) for start in starts]),
            slots=self._tensor([chunk.sequence.slot for chunk in chunks]),
            is_new=torch.tensor([start == 0 for start in starts], device=self._device),
            starts=starts,
            reaches={kind: self._reach(look, chunks) for kind, look in self._looks.items()},
        )

    def _reach(self, look: Look, chunks: list[Chunk]) -> Reach:
        width = chunks[0].num_tokens
        lists = [look.tiles(chunk.start, chunk.start + width) for chunk in chunks]
        most = max(map(len, lists))
        kept = [[look.blocks(chunk.start + i) for i in range(width)] for chunk in chunks]
        return Reach(
            self._tensor([tiles + [-1] * (most - len(tiles)) for tiles in lists]),
            self._tensor([self._table(chunk, tiles, most) for chunk, tiles in zip(chunks, lists, strict=True)]),
            self._tensor(kept).view(len(chunks), width, -1),
        )

    def _table(self, chunk: Chunk, tiles: list[int], most: int) -> list[int]:
        """The blocks of all tiles; 0 for those that are not there."""
        blocks, per = chunk.sequence.blocks, self._per_tile
        found = chain.from_iterable(blocks[tile * per : (tile + 1) * per] for tile in tiles[:-1])
        table = [block if block != HOLE else 0 for block in (*found, *blocks[tiles[-1] * per : (tiles[-1] + 1) * per])]
        return table + [0] * (most * per - len(table))

    def _tensor(self, numbers: Seq[object]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device, non_blocking=True)
