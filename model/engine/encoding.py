"""The runner of an encoder: whole texts in, vectors and probabilities out. Nothing is drawn and nothing kept.

It takes the same plans as `Runner`; each chunk is a whole text. It knows nothing of queues or requests' lives.
"""

import torch
from torch import Tensor

from model.cache.store import PagedStore
from model.config import EngineConfig
from model.engine.pooling import Pools, as_bytes
from model.engine.runner import Computed
from model.engine.scheduler import Fork, StepPlan
from model.nn.batch import pad_rows
from model.nn.bert import Encoder, SpanAttention, text_positions
from model.nn.decoder import as_dtype, product_shapes
from model.nn.rows import linear_rows


class EncoderRunner:
    """One network on one device. Not thread-safe: the engine's thread is the only caller. The store has no blocks."""

    def __init__(self, encoder: Encoder, config: EngineConfig) -> None:
        self.decoder, self.config = encoder, config
        self.device, dtype = torch.device(config.device), as_dtype(config.dtype)
        self.store = PagedStore(encoder.config, 0, config.block_size, self.device, dtype)
        self._row_multiple = linear_rows(product_shapes(encoder), self.device, dtype)
        self._pools = Pools(encoder.config.hidden_size, config.max_num_seqs)

    def can_run_ahead(self, plan: StepPlan) -> bool:
        """Never: a step is complete when `start` returns."""
        return False

    def collect(self, flight: Computed) -> Computed:
        """What `start` gave."""
        return flight

    def fork(self, fork: Fork) -> None:
        """Never called: nobody goes on from a text that draws nothing."""
        raise NotImplementedError("an encoder keeps nothing of a sequence")

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> Computed:
        """Compute every text to its end."""
        ops = SpanAttention([chunk.num_tokens for chunk in plan.chunks])
        ids = [id for chunk in plan.chunks for id in chunk.sequence.request.prompt_ids]
        rows = (torch.tensor(ids), text_positions(ops.lengths))
        hidden = self.decoder(*(pad_rows(each, self._row_multiple).to(self.device) for each in rows), ops)
        texts = torch.split_with_sizes(hidden[: len(ids)], list(ops.lengths))
        done = Computed(results=self._probabilities(plan, texts, ops))
        for chunk, text in zip(plan.chunks, texts, strict=True):
            if not bool(text.isfinite().all()):
                done.failed.append(chunk.sequence)
            elif chunk.sequence.request.task == "embed":
                done.results.update(self._pools.results([chunk], text))
        return done

    def _probabilities(self, plan: StepPlan, texts: tuple[Tensor, ...], ops: SpanAttention) -> dict[str, bytes]:
        """Of the labels of those texts whose labels are wanted."""
        wanted = [i for i, chunk in enumerate(plan.chunks) if chunk.sequence.request.task == "classify"]
        if not wanted:
            return {}
        firsts = pad_rows(torch.stack([texts[i][0] for i in wanted]), self._row_multiple)
        chances = self.decoder.scores(firsts, ops).float().softmax(-1)
        return {
            plan.chunks[i].sequence.id: as_bytes(row) for i, row in zip(wanted, chances[: len(wanted)], strict=True)
        }
