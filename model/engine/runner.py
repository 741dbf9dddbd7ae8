"""Turns a step's plan into tensors, runs the network over the paged cache and draws the next ids.

It owns the network, the cache tensors and the device; it knows nothing of queues, requests' lives or text.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from model.cache.states import StateStore
from model.cache.store import PagedStore
from model.config import EngineConfig
from model.engine.pooling import Pools
from model.engine.scheduler import Chunk, Fork, StepPlan
from model.engine.sequence import Sequence
from model.engine.sources import Sources
from model.engine.stream_groups import StreamGroups
from model.nn.attention import PagedAttention
from model.nn.batch import TILE, AttentionGroup, ForwardBatch, pad_rows
from model.nn.decoder import Decoder, as_dtype, product_shapes
from model.nn.mixers import inner_products
from model.nn.pieces import Pieces, agreeing_counts
from model.nn.reading import PagedReading
from model.nn.rows import attention_rows, linear_rows
from model.request import TokenLogprob
from model.sampling.sampler import Row, sample


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step brought, by request id: drawn ids, their log-probabilities where asked for, the results of those that
    draw nothing and were computed to their end, and the sequences whose numbers were not finite."""

    token_ids: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprob] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    failed: list[Sequence] = field(default_factory=list)


class Runner:
    """One network on one device. Not thread-safe: the engine's thread is the only caller."""

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        if TILE % config.block_size:
            raise ValueError(f"block_size {config.block_size} does not divide the attention tile of {TILE} tokens")
        self.decoder, self.config = decoder, config
        self.device = torch.device(config.device)
        dtype = as_dtype(config.dtype)
        self.store = PagedStore(decoder.config, config.num_blocks, config.block_size, self.device, dtype)
        matrices = product_shapes(decoder)
        self.row_multiple = linear_rows(matrices, self.device, dtype)
        shape, fixed = decoder.config, self.device.type == "cpu" and (dtype == torch.float32 or config.deterministic)
        self.attention_rows = 1
        if fixed:
            products = inner_products(shape)
            self.attention_rows = max(attention_rows(k, n, shape.num_kv_heads, dtype) for k, n in products)
        self.states = StateStore(shape, config.max_num_seqs, self.device)
        self.streams = StreamGroups(decoder, config.block_size, self.device)
        self.pools = Pools(shape.hidden_size, config.max_num_seqs)
        self.pieces: Pieces = {}
        if fixed and dtype != torch.float32:
            most = {shape.vocab_size: config.max_num_seqs}  # rows of the head are of sequences, not tokens
            self.pieces = {
                each: agreeing_counts(each, dtype, most.get(each[0], config.max_batch_tokens)) for each in matrices
            }
        self.sources: Sources | None = None
        if decoder.encoder is not None:
            self.sources = Sources(decoder, config, self.row_multiple, self.attention_rows, self.pieces)

    def can_run_ahead(self, plan: StepPlan) -> bool:
        """Never: a step is complete when `start` returns."""
        return False

    def collect(self, flight: Computed) -> Computed:
        """What `start` gave."""
        return flight

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> Computed:
        """Compute every chunk's keys and values, and draw one id for each chunk that draws."""
        batch = self.build(plan)
        ops = self._ops(plan, batch)
        hidden = self.decoder(batch.token_ids, batch.positions, ops)
        done = Computed(failed=self._not_finite(plan, hidden), results=self.pools.results(plan.chunks, hidden))
        drawing = [chunk for chunk in plan.chunks if chunk.draws]
        if drawing:
            wanted = pad_rows(hidden[batch.logit_rows], self.row_multiple)
            drawn = sample(self.decoder.logits(wanted, ops)[: len(drawing)], [row_of(chunk) for chunk in drawing])
            for chunk, token_id, logprob, bad in zip(drawing, drawn.token_ids, drawn.logprobs, drawn.bad, strict=True):
                done.token_ids[chunk.sequence.id] = token_id
                if logprob is not None:
                    done.logprobs[chunk.sequence.id] = logprob
                if bad and chunk.sequence not in done.failed:
                    done.failed.append(chunk.sequence)
        clear_failed(self.store, plan, done)
        return done

    def fork(self, fork: Fork) -> None:
        """Copy for one sequence what is kept of another."""
        if fork.block is not None:
            self.store.copy(*fork.block)
        if self.sources is not None:
            self.sources.store.copy(*fork.slot)

    def _ops(self, plan: StepPlan, batch: ForwardBatch) -> PagedAttention:
        """How the decoder's rows attend; sources that are new are read first."""
        if self.sources is None:
            return PagedAttention(self.decoder.config, self.store, batch, self.pieces, self.states)
        self.sources.read(plan.chunks)
        return PagedReading(self.decoder.config, self.store, self.sources.store, batch, self.pieces)

    def _not_finite(self, plan: StepPlan, hidden: Tensor) -> list[Sequence]:
        """Sequences with a row that is not finite. A bad key or value shows here too, since its row sees itself."""
        finite = hidden.isfinite().all(dim=1)
        if bool(finite.all()):
            return []
        widths = [chunk.num_tokens for chunk in plan.chunks]
        pieces = torch.split_with_sizes(finite[: sum(widths)], widths)
        return [chunk.sequence for chunk, rows in zip(plan.chunks, pieces, strict=True) if not bool(rows.all())]

    def build(self, plan: StepPlan) -> ForwardBatch:
        """The plan as tensors. Rows follow the plan's chunks, each chunk's tokens in order."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        first_rows: dict[int, int] = {}
        size = self.config.block_size
        for chunk in plan.chunks:
            first_rows[id(chunk)] = len(ids)
            span = range(chunk.start, chunk.start + chunk.num_tokens)
            blocks = chunk.sequence.blocks
            ids += chunk.sequence.ids(span.start, span.stop)
            positions += span
            if self.streams.has_blocks:
                slots += [blocks[at // size] * size + at % size for at in span]
            if chunk.draws:
                wanted.append(len(ids) - 1)
        by_width = sorted(plan.chunks, key=lambda c: (c.num_tokens, -(c.start + c.num_tokens)))
        sets = [list(chunks) for _, chunks in groupby(by_width, key=lambda c: c.num_tokens)]
        groups = tuple(self._group(chunks, first_rows) for chunks in sets) if self.streams.has_full else ()
        streams = tuple(self.streams.group(chunks, first_rows) for chunks in sets) if self.streams.kinds else ()
        return ForwardBatch(
            token_ids=pad_rows(self._tensor(ids), self.row_multiple),
            positions=pad_rows(self._tensor(positions), self.row_multiple),
            num_rows=len(ids),
            slots=self._tensor(slots),
            groups=groups,
            logit_rows=self._tensor(wanted),
            attention_rows=self.attention_rows,
            streams=streams,
            stream_rows=max(self.row_multiple, self.attention_rows),
        )

    def _group(self, chunks: list[Chunk], first_rows: dict[int, int]) -> AttentionGroup:
        """Chunks of equal width, longest context first."""
        width = chunks[0].num_tokens
        tiles = [-(-(chunk.start + width) // TILE) for chunk in chunks]
        per_row = tiles[0] * (TILE // self.config.block_size)
        tables = [(chunk.sequence.blocks + [0] * per_row)[:per_row] for chunk in chunks]
        return AttentionGroup(
            rows=self._tensor([list(range(first := first_rows[id(c)], first + width)) for c in chunks]),
            block_tables=self._tensor(tables),
            live=tuple(sum(n > tile for n in tiles) for tile in range(tiles[0])),
            min_position=min(chunk.start for chunk in chunks),
            states=tuple(chunk.sequence.slot for chunk in chunks),
        )

    def _tensor(self, numbers: Seq[int] | Seq[Seq[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)


def clear_failed(store: PagedStore, plan: StepPlan, done: Computed) -> None:
    """Clear the blocks that those who failed have written to, before anyone else gets them: a masked NaN is still a NaN
    to whoever sums over it. Those before their chunks are finite, and may be others' as well."""
    for chunk in plan.chunks if done.failed else ():
        if chunk.sequence in done.failed:
            store.clear(chunk.sequence.blocks[chunk.start // store.block_size :])


def row_of(chunk: Chunk) -> Row:
    """What the sampler wants to know of a chunk that draws."""
    sequence = chunk.sequence
    allowed = sequence.matcher.allowed() if sequence.matcher else None
    return Row(sequence.request.sampling, sequence.request.prompt_ids, sequence.output_ids, allowed, sequence.seen)
