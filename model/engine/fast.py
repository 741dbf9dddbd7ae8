"""The runner for a GPU: kernels, graphs, and a host that is a step ahead.

It takes the same plans as `Runner` and gives the same results. What differs: a step is started and collected at two
times, ids stay on the device for the step that follows, and a step in which every sequence computes one token replays
a recorded graph for the next larger number of rows. It knows nothing of queues, requests' lives or text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cache.store import PagedStore
from model.config import EngineConfig, ModelConfig
from model.engine.pooling import Pools
from model.engine.runner import Computed, row_of
from model.engine.scheduler import Chunk, Fork, StepPlan
from model.engine.seats import Seats
from model.engine.sequence import Sequence
from model.nn.batch import RaggedBatch, piece_rows
from model.nn.decoder import Decoder, as_dtype
from model.nn.ops import Ops
from model.sampling.device import Draws, draw_rows, needs_host
from model.sampling.sampler import Drawn, sample

LEAST_SPAN, MOST_SPANS = 256, 32
IDS, POSITIONS, SLOTS, SEATS, SOURCES = range(5)  # rows of the numbers that the host sends, int64
Numbers = NDArray[np.int64]
MakeOps = Callable[[ModelConfig, PagedStore, RaggedBatch, bool], Ops]
Act = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Flight:
    """A step on its way. `numbers`: ids drawn, then 0 for each of these that is bad, then 0 for each row that is not
    finite; they are there once `landed` has happened. Or the host has drawn already: `drawn`."""

    plan: StepPlan
    order: tuple[Chunk, ...]
    numbers: Tensor
    landed: "torch.cuda.Event | None"
    drawn: Drawn | None = None
    results: dict[str, bytes] = field(default_factory=dict)  # of those that draw nothing


class FastRunner:
    """One network on one device. Not thread-safe: the engine's thread is the only caller.

    `make_ops` gives the operations of one batch. `record` makes a replayable graph of a function that reads and writes
    the same tensors every time; by default a CUDA graph.
    """

    def __init__(
        self, decoder: Decoder, config: EngineConfig, make_ops: MakeOps, record: "Callable[[Act], Act] | None" = None
    ) -> None:
        self.decoder, self.config = decoder, config
        self.device = torch.device(config.device)
        self.store = PagedStore(
            decoder.config, config.num_blocks, config.block_size, self.device, as_dtype(config.dtype)
        )
        self.span = max(LEAST_SPAN, _power_of_2(-(-config.max_model_len // MOST_SPANS)))
        self._make_ops, self._record = make_ops, record or _Recorder()
        self._piece = piece_rows(decoder.config.num_heads, decoder.config.num_kv_heads)
        self._seats = Seats(config.max_num_seqs, -(-config.max_model_len // config.block_size), self.device)
        self._drawn = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self.device)
        # What graphs leave: one place for all of them, where each having its own would add up to gigabytes.
        shape = (config.max_num_seqs, decoder.config.hidden_size)
        self._hidden = torch.zeros(shape, dtype=self.store.keys.dtype, device=self.device)
        self._finite = torch.zeros(config.max_num_seqs, dtype=torch.bool, device=self.device)
        self._places: dict[Sequence, int] = {}  # whose id stands where in `_drawn`
        self._judged: tuple[StepPlan | None, bool] = None, True  # asked for several times in a row
        self._pools = Pools(decoder.config.hidden_size, config.max_num_seqs)
        self._graphs: dict[tuple[int, int], tuple[Tensor, Act, Ops]] = {}

    def warm(self) -> None:
        """Record every graph, so that no request waits for one."""
        for num_rows in reversed(row_counts(self.config.max_num_seqs)):
            for num_spans in reversed(self._span_counts()):
                self._graph(num_rows, num_spans)

    def can_run_ahead(self, plan: StepPlan) -> bool:
        """Whether the plan can be started before the ids of the one before it are known to the host."""
        judged, answer = self._judged
        if judged is not plan:
            answer = not any(_needs_host(chunk) if chunk.draws else not chunk.sequence.draws for chunk in plan.chunks)
            self._judged = plan, answer
        return answer

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> Flight:
        """Begin to compute. Sequences whose last id is pending must have drawn it in the step started before."""
        order = tuple(sorted(plan.chunks, key=lambda chunk: chunk.num_tokens > 1))
        num_single = sum(chunk.num_tokens == 1 for chunk in order)
        numbers, wanted, pieces = self._rows(order)
        longest = max(chunk.start + chunk.num_tokens for chunk in order)
        num_spans = next(n for n in self._span_counts() if n * self.span >= longest)
        if num_single == len(order):
            num_rows = next(n for n in row_counts(self.config.max_num_seqs) if n >= num_single)
            inputs, replay, ops = self._graph(num_rows, num_spans)
            inputs.copy_(self._sent(_padded(numbers, num_rows, self._seats.spare)), non_blocking=True)
            replay()
            hidden, finite = self._hidden[:num_single], self._finite[:num_single]
        else:
            sent, sent_pieces = self._sent(numbers), self._sent(np.array(pieces, dtype=np.int32))
            ops = self._ops(sent, num_single, sent_pieces, num_spans)
            hidden, finite = self._forward(sent, ops)
        drawing, results = [chunk for chunk in order if chunk.draws], self._pools.results(order, hidden)
        if len(wanted) < len(hidden):
            hidden = hidden[self._sent(np.array(wanted, dtype=np.int64))]
        logits = self.decoder.logits(hidden, ops)
        return replace(self._draw(plan, order, drawing, logits, finite), results=results)

    def fork(self, fork: Fork) -> None:
        """Copy for one sequence what is kept of another; the device does it before what it is asked for next."""
        if fork.block is not None:
            self.store.copy(*fork.block)

    def collect(self, flight: Flight) -> Computed:
        """Wait for a started step, and what it brought."""
        if flight.landed is not None:
            flight.landed.synchronize()
        numbers: list[int] = flight.numbers.tolist()
        drawing = [chunk for chunk in flight.order if chunk.draws]
        finite = numbers[2 * len(drawing) :]
        done = Computed(results=flight.results)
        at = 0
        for chunk in flight.order:
            if not all(finite[at : at + chunk.num_tokens]):
                done.failed.append(chunk.sequence)
            at += chunk.num_tokens
        for i, chunk in enumerate(drawing):
            done.token_ids[chunk.sequence.id] = numbers[i]
            if not numbers[len(drawing) + i] and chunk.sequence not in done.failed:
                done.failed.append(chunk.sequence)
            if flight.drawn is not None and (logprob := flight.drawn.logprobs[i]) is not None:
                done.logprobs[chunk.sequence.id] = logprob
        for chunk in flight.order if done.failed else ():
            if chunk.sequence in done.failed:
                # The step that may be running now comes first on the device. What it leaves behind beyond a sequence's
                # tokens is never loaded by a kernel. Blocks before this chunk's may be others' as well.
                self.store.clear(chunk.sequence.blocks[chunk.start // self.config.block_size :])
        return done

    def _draw(
        self, plan: StepPlan, order: tuple[Chunk, ...], drawing: list[Chunk], logits: Tensor, finite: Tensor
    ) -> Flight:
        params = [chunk.sequence.request.sampling for chunk in drawing]
        drawn = None
        if not drawing:
            ids = good = finite[:0].long()
        elif self.can_run_ahead(plan):
            ids, bad = draw_rows(logits, Draws(params, [_position(chunk) for chunk in drawing]))
            good = (~bad).long()
        else:
            drawn = sample(logits, [row_of(chunk) for chunk in drawing])
            ids = self._sent(np.array(drawn.token_ids, dtype=np.int64))
            good = self._sent(1 - np.array(drawn.bad, dtype=np.int64))
        self._drawn[: len(drawing)] = ids
        self._places = {chunk.sequence: i for i, chunk in enumerate(drawing)}
        numbers = torch.cat([ids, good, finite.long()])
        if self.device.type != "cuda":
            return Flight(plan, order, numbers, None, drawn)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record()
        return Flight(plan, order, host, landed, drawn)

    def _rows(self, order: tuple[Chunk, ...]) -> tuple[Numbers, list[int], list[list[int]]]:
        """The numbers of every row [5, n], the rows whose logits are wanted, and the pieces of chunks."""
        ids, positions, slots, seats, sources = list[int](), list[int](), list[int](), list[int](), list[int]()
        wanted, pieces, size = list[int](), list[list[int]](), self.config.block_size
        places = self._seats.of([chunk.sequence for chunk in order])
        for chunk, seat in zip(order, places, strict=True):
            sequence, num = chunk.sequence, chunk.num_tokens
            if num > 1:
                for at in range(0, num, self._piece):
                    pieces.append([seat, len(ids) + at, min(self._piece, num - at), chunk.start + at])
            known, blocks = sequence.ids(chunk.start, chunk.start + num), sequence.blocks
            ids += known
            sources += [-1] * len(known)
            if len(known) < num:
                ids.append(0)
                sources.append(self._places[sequence])
            span = range(chunk.start, chunk.start + num)
            positions += span
            slots += [blocks[at // size] * size + at % size for at in span]
            seats += [seat] * num
            if chunk.draws:
                wanted.append(len(ids) - 1)
        return np.array([ids, positions, slots, seats, sources], dtype=np.int64), wanted, pieces

    def _ops(self, inputs: Tensor, num_single: int, pieces: Tensor, num_spans: int) -> Ops:
        """The operations of a step over rows as `_rows` describes them. Only views, so that a recording sees new
        numbers in the same place."""
        batch = RaggedBatch(
            inputs[IDS], inputs[POSITIONS], inputs[SLOTS], inputs[SEATS], num_single, pieces.view(-1, 4),
            self._seats.tables, self.span, num_spans,
        )  # fmt: skip
        return self._make_ops(self.decoder.config, self.store, batch, self.config.deterministic)

    def _forward(self, inputs: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """Hidden rows, and which of them are finite."""
        ids = torch.where(inputs[SOURCES] >= 0, self._drawn[inputs[SOURCES].clamp(min=0)], inputs[IDS])
        size = self.config.block_size
        # Every row enters its own block: the same number for all rows of a block, and nothing for the host to send.
        blocks = (inputs[SLOTS].clamp(min=0) // size).int()
        self._seats.tables[inputs[SEATS], inputs[POSITIONS] // size] = blocks
        hidden = self.decoder(ids, inputs[POSITIONS], ops)
        return hidden, hidden.isfinite().all(dim=1)

    @torch.inference_mode()
    def _graph(self, num_rows: int, num_spans: int) -> tuple[Tensor, Act, Ops]:
        """The tensor that the numbers of `num_rows` single rows go to, a function that fills `_hidden` and `_finite`
        from it, and the operations that it uses."""
        key = (num_rows, num_spans)
        if key not in self._graphs:
            nothing = _padded(np.zeros((5, 0), dtype=np.int64), num_rows, self._seats.spare)
            inputs = torch.from_numpy(nothing).to(self.device)
            ops = self._ops(inputs, num_rows, torch.empty(0, 4, dtype=torch.int32, device=self.device), num_spans)

            def step() -> None:
                hidden, finite = self._forward(inputs, ops)
                self._hidden[:num_rows] = hidden
                self._finite[:num_rows] = finite

            self._graphs[key] = inputs, self._record(step), ops
        return self._graphs[key]

    def _span_counts(self) -> list[int]:
        """Few, since each has its graphs: a grid for more spans than there are costs some idle programs."""
        most = -(-self.config.max_model_len // self.span)
        return sorted({min(most, n) for n in (2, 8, MOST_SPANS)})

    def _sent(self, numbers: NDArray[np.integer]) -> Tensor:
        """Numbers on the device. Pinned, so that the copy waits for nothing and nothing waits for it."""
        host = torch.from_numpy(numbers)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host


class _Recorder:
    """CUDA graphs that share their memory: only one is replayed at a time, and its results are used before the next."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Act) -> Act:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles kernels and lets libraries set themselves up, which a recording can't hold
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


def row_counts(most: int) -> list[int]:
    """The numbers of rows that there are graphs for."""
    steps = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 512, 32), *range(512, 1 << 20, 256)]
    return [n for n in steps if n < most] + [most]


def _padded(numbers: Numbers, num_rows: int, spare: int) -> Numbers:
    """Columns for rows of padding appended: nobody's seat, position 0, no slot."""
    padding = np.zeros((5, num_rows - numbers.shape[1]), dtype=np.int64)
    padding[SLOTS] = padding[SOURCES] = -1
    padding[SEATS] = spare
    return np.concatenate([numbers, padding], axis=1)


def _needs_host(chunk: Chunk) -> bool:
    """Whether its id can't be drawn on the device; a grammar moves on with every id, on the host."""
    sequence = chunk.sequence
    return sequence.matcher is not None or needs_host(sequence.request.sampling, _position(chunk))


def _position(chunk: Chunk) -> int:
    """Of the id that the chunk draws, among the outputs."""
    return chunk.start + chunk.num_tokens - chunk.sequence.num_prompt


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
