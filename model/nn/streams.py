"""Layers whose past has a constant size: the two ways to compute them, whatever their kind.

A `Cell` carries a state from token to token; a `Look` scores some of the cached keys. Both are computed over whole
sequences (training, and the reference in tests) or over a batch of running ones. This knows no kind of layer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.cache.states import StateStore
from model.cache.store import PagedStore
from model.nn.batch import TILE, ForwardBatch, Reach, StreamGroup
from model.nn.ops import Cell, Look, Ops
from model.nn.running import RunningMix


def in_rows(queries: Tensor, kv_heads: int) -> Tensor:
    """[b, t, heads, d] -> [kv_heads, b, t * shared, d]: query heads that read one kv head become rows."""
    b, t, heads, d = queries.shape
    return queries.view(b, t, kv_heads, heads // kv_heads, d).permute(2, 0, 1, 3, 4).reshape(kv_heads, b, -1, d)


def in_heads(mixed: Tensor, t: int) -> Tensor:
    """The way back: [kv_heads, b, t * shared, d] -> [b, t, heads, d]."""
    kv_heads, b, rows, d = mixed.shape
    return mixed.view(kv_heads, b, t, rows // t, d).permute(1, 2, 0, 3, 4).reshape(b, t, -1, d)


def recall_all(look: Look, queries: tuple[Tensor, ...], k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Whole sequences: queries [b, t, heads, d], k, v [b, t, kv_heads, d] -> [b, t, heads, d]. TILE rows at a time, so
    that a window costs no more than it is wide."""
    (_, t, heads, d), kv_heads, device = queries[0].shape, k.shape[2], k.device
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, -t % TILE)).permute(2, 0, 1, 3) for x in (k, v))
    parts = []
    for start in range(0, t, TILE):
        stop = min(t, start + TILE)
        rows = tuple(in_rows(each[:, start:stop] * d**-0.5, kv_heads) for each in queries)
        at = torch.arange(start, stop, device=device)
        kept = torch.tensor([look.blocks(p) for p in range(start, stop)], dtype=torch.int64, device=device)
        at, kept = (x.repeat_interleave(heads // kv_heads, dim=0)[None] for x in (at, kept.view(stop - start, -1)))
        prepared, scores, seen, mixed = look.prepare(rows), list[Tensor](), list[Tensor](), list[Tensor]()
        for low in (tile * TILE for tile in look.tiles(start, stop)):
            mixed.append(values[:, :, low : low + TILE])
            scores.append(look.scores(prepared, keys[:, :, low : low + TILE], at, torch.full((1,), low, device=device)))
            seen.append(look.visible(at, torch.arange(low, low + TILE, device=device)[None], kept))
        masked = torch.cat(scores, dim=-1).float().masked_fill(~torch.cat(seen, dim=-1), -torch.inf)
        weights = F.dropout(masked.softmax(-1), dropout).to(v.dtype)
        parts.append(in_heads(weights @ torch.cat(mixed, dim=2), stop - start))
    return torch.cat(parts, dim=1)


def recall_tiles(
    look: Look, group: StreamGroup, reach: Reach, store: PagedStore, layer: int, queries: tuple[Tensor, ...], least: int
) -> Tensor:
    """Running sequences: queries [b, t, heads, d] of one group, over the cache -> [b, t, heads, d]. Rows are padded to
    a multiple of `least`. Tiles are reduced as in full attention, in the order of positions; those that no row can see
    are left out, which changes nothing."""
    (b, t, heads, d), kv_heads = queries[0].shape, store.keys.shape[1]
    shared = heads // kv_heads
    missing = -(t * shared) % least
    rows = tuple(F.pad(in_rows(each * d**-0.5, kv_heads), (0, 0, 0, missing)) for each in queries)
    at = F.pad(group.positions.repeat_interleave(shared, dim=1), (0, missing))
    kept = F.pad(reach.kept.repeat_interleave(shared, dim=1), (0, 0, 0, missing), value=-1)
    prepared, mix = look.prepare(rows), RunningMix(rows[0])
    per_tile, offsets = TILE // store.block_size, torch.arange(TILE, device=at.device)
    for step in range(reach.tiles.shape[1]):
        tables = reach.tables[:, step * per_tile : (step + 1) * per_tile].reshape(-1)
        keys, values = (x.view(kv_heads, b, TILE, d) for x in store.gather(layer, tables))
        first = reach.tiles[:, step] * TILE
        scores = look.scores(prepared, keys, at, first).float()
        seen = look.visible(at, first[:, None] + offsets, kept)
        mix.add(scores.masked_fill_(~seen, -torch.inf), values.reshape(-1, TILE, d), b)
    return in_heads(mix.result()[:, :, : t * shared], t).to(queries[0].dtype)


def advance_all(cell: Cell, layer: int, x: Tensor, batch: ForwardBatch, states: StateStore, ops: Ops) -> Tensor:
    """Running sequences: rows x [n, in] -> [n, out], their states read, advanced and stored."""
    mixed: Tensor | None = None
    for group in batch.streams:
        state = states.read(layer, group.slots, group.is_new)
        out, state = cell.advance(state, x[group.rows], group.starts, ops, batch.stream_rows)
        states.write(layer, group.slots, state)
        mixed = x.new_zeros(x.shape[0], out.shape[-1]) if mixed is None else mixed
        mixed[group.rows] = out.to(x.dtype)
    assert mixed is not None, "a step without rows"
    return mixed
