"""The runner for a CPU with the native core: one call a step, which computes everything up to the logits.

It takes the same plans as `Runner` and gives the same results, within rounding. Greedy rows are decided by the core,
all others drawn by the sampler. It knows nothing of queues, requests' lives or text.
"""

import ctypes
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from model.cache.store import PagedStore
from model.config import EngineConfig
from model.engine.pooling import Pools, wanted_rows
from model.engine.runner import Computed, clear_failed, row_of
from model.engine.scheduler import Chunk, Fork, StepPlan
from model.engine.sequence import Sequence
from model.native.library import Step
from model.native.packing import Core, Packed
from model.nn.decoder import Decoder, as_dtype
from model.sampling.device import needs_host
from model.sampling.sampler import sample


class NativeRunner:
    """One network on this machine's processor. Not thread-safe: the engine's thread is the only caller.

    The store's blocks are the core's own affair: a block's keys lie [head_dim, block_size] in it, in bfloat16 in pairs.
    With `drop` the decoder gives up its matrices, so that they are in memory once. As many threads compute as torch has
    been told to use.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        library: ctypes.CDLL,
        *,
        drop: bool = False,
    ) -> None:
        self.decoder, self.config = decoder, config
        dtype, shape = as_dtype(config.dtype), decoder.config
        self.store = PagedStore(shape, config.num_blocks, config.block_size, torch.device("cpu"), dtype)
        packed = Packed(decoder, self.store, dtype, config.quantize == "int8", drop)
        rows = max(config.max_batch_tokens, config.max_num_seqs)
        self._core = Core(library, packed, torch.get_num_threads(), rows, config.max_model_len)
        self._logits = torch.zeros(config.max_num_seqs, shape.vocab_size)
        self._best = np.zeros(config.max_num_seqs, dtype=np.int32)
        self._finite = bytearray(rows)
        finite = (ctypes.c_char * rows).from_buffer(self._finite)
        self._results = self._logits.data_ptr(), self._best.ctypes.data, ctypes.addressof(finite)
        self._pools, self._hidden = Pools(shape.hidden_size, config.max_num_seqs), torch.empty(0, shape.hidden_size)

    def can_run_ahead(self, plan: StepPlan) -> bool:
        """Never: a step is complete when `start` returns."""
        return False

    def collect(self, flight: Computed) -> Computed:
        """What `start` gave."""
        return flight

    def start(self, plan: StepPlan) -> Computed:
        """Compute every chunk's keys and values, and draw one id for each chunk that draws."""
        done = Computed(results=self._compute(plan), failed=self._not_finite(plan))
        drawing = [chunk for chunk in plan.chunks if chunk.draws]
        best = self._best[: len(drawing)].tolist()
        asking = [i for i, chunk in enumerate(drawing) if not _is_greedy(chunk)]
        for chunk, token_id in zip(drawing, best, strict=True):
            done.token_ids[chunk.sequence.id] = max(token_id, 0)
        bad = {i for i, token_id in enumerate(best) if token_id < 0}
        if asking:
            logits = self._logits[: len(drawing)] if len(asking) == len(drawing) else self._logits[asking]
            with torch.inference_mode(), _one_thread():
                drawn = sample(logits, [row_of(drawing[i]) for i in asking])
            for i, token_id, logprob, is_bad in zip(asking, drawn.token_ids, drawn.logprobs, drawn.bad, strict=True):
                done.token_ids[drawing[i].sequence.id] = token_id
                if logprob is not None:
                    done.logprobs[drawing[i].sequence.id] = logprob
                if is_bad:
                    bad.add(i)
        done.failed.extend(drawing[i].sequence for i in sorted(bad) if drawing[i].sequence not in done.failed)
        clear_failed(self.store, plan, done)
        return done

    def fork(self, fork: Fork) -> None:
        """Copy for one sequence what is kept of another."""
        if fork.block is not None:
            self.store.copy(*fork.block)

    def _compute(self, plan: StepPlan) -> dict[str, bytes]:
        """One call of the core: `_logits`, `_best` of the rows that draw, `_finite` of all. The results of those that
        draw nothing."""
        ids, chunks, tables, wanted, told = (array("i") for _ in range(5))  # cheaper than NumPy's for a few numbers
        row, size = 0, self.config.block_size
        for chunk in plan.chunks:
            end = chunk.start + chunk.num_tokens
            ids.extend(chunk.sequence.ids(chunk.start, end))
            chunks.extend((row, chunk.num_tokens, chunk.start, len(tables)))
            tables.extend(chunk.sequence.blocks[: -(-end // size)])
            told.extend(row + at for at in wanted_rows(chunk))
            row += chunk.num_tokens
            if chunk.draws:
                wanted.append(row - 1)
        hidden = torch.empty(len(told), self.decoder.config.hidden_size) if told else self._hidden
        read = (numbers.buffer_info()[0] for numbers in (ids, chunks, tables, wanted))
        where = *read, *self._results, told.buffer_info()[0], hidden.data_ptr()
        self._core.step(Step(row, len(plan.chunks), len(wanted), len(told), *where))
        return self._pooled(plan, hidden) if told else {}

    def _pooled(self, plan: StepPlan, hidden: Tensor) -> dict[str, bytes]:
        """What the hidden rows that were asked for make of their texts."""
        found, at = dict[str, bytes](), 0
        for chunk in plan.chunks:
            num = len(wanted_rows(chunk))
            result = self._pools.add(chunk, hidden[at : at + num]) if num else None
            if result is not None:
                found[chunk.sequence.id] = result
            at += num
        return found

    def _not_finite(self, plan: StepPlan) -> list[Sequence]:
        """Sequences with a row that is not finite. A bad key or value shows here too, since its row sees itself."""
        if self._finite.find(0, 0, plan.num_tokens) < 0:
            return []
        finite = np.frombuffer(self._finite, dtype=np.uint8)[: plan.num_tokens]
        ends = np.cumsum([chunk.num_tokens for chunk in plan.chunks])
        pieces = np.split(finite, ends[:-1])
        return [chunk.sequence for chunk, rows in zip(plan.chunks, pieces, strict=True) if not rows.all()]


@contextmanager
def _one_thread() -> Iterator[None]:
    """For torch's own work between two calls of the core: its threads would spin while the core's want to compute, and
    the other way round."""
    num = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num)


def _is_greedy(chunk: Chunk) -> bool:
    """Whether the highest of the network's own logits is the answer."""
    sequence = chunk.sequence
    params = sequence.request.sampling
    plain = params.temperature == 0 and sequence.matcher is None
    return plain and not needs_host(params, chunk.start + chunk.num_tokens - sequence.num_prompt)
