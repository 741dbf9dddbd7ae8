"""Sources of running sequences: the encoder reads each once, and what the decoder wants of it lies in the sequence's
slot.

A part of the runner: it owns the slots' tensors and knows no order of work. A source is read with a sequence's first
chunk, after admission and again after a preemption, when the slot is another one.
"""

from collections.abc import Sequence as Seq

import torch

from model.cache.cross import CrossStore
from model.config import EngineConfig
from model.engine.scheduler import Chunk
from model.nn.batch import TILE, pad_rows
from model.nn.decoder import Decoder, as_dtype
from model.nn.encoder import TiledEncoding
from model.nn.pieces import Pieces


class Sources:
    """The encoder of a network, and a slot for each sequence that may run, of `max_model_len` source tokens."""

    def __init__(
        self, decoder: Decoder, config: EngineConfig, row_multiple: int, attention_rows: int, pieces: Pieces
    ) -> None:
        self._decoder, self._device = decoder, torch.device(config.device)
        self._row_multiple, self._attention_rows, self._pieces = row_multiple, attention_rows, pieces
        length = -(-config.max_model_len // TILE) * TILE
        self.store = CrossStore(decoder.config, config.max_num_seqs, length, self._device, as_dtype(config.dtype))

    def read(self, chunks: Seq[Chunk]) -> None:
        """Fill the slots of those who begin. All their sources go through the encoder together, as rows that do not
        see each other's."""
        new = [chunk.sequence for chunk in chunks if chunk.start == 0]
        if not new:
            return
        sources = [sequence.request.source_ids for sequence in new]
        ids = torch.tensor([i for source in sources for i in source], device=self._device)
        at = torch.cat([torch.arange(len(source), device=self._device) for source in sources])
        lengths = [len(source) for source in sources]
        ops = TiledEncoding(self._decoder.config, lengths, self._attention_rows, self._pieces)
        rows = self._decoder.encode(pad_rows(ids, self._row_multiple), pad_rows(at, self._row_multiple), ops)
        memory = self._decoder.memory(rows, ops)
        for sequence, length in zip(new, lengths, strict=True):
            self.store.open(sequence.slot, length)
        for layer, both in enumerate(memory):
            keys, values = (torch.split(x[: len(ids)], lengths) for x in both)
            for sequence, k, v in zip(new, keys, values, strict=True):
                self.store.write(layer, sequence.slot, k, v)
