"""One vector of a whole text, from hidden rows that come chunk by chunk.

It keeps a sum for every slot and knows no network. Rows are added one after another, in float64 and in the order of the
text, so that a sum is the same to the bit wherever the text was cut; a text that starts again starts its sum again.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from model.engine.scheduler import Chunk

LEAST = 1e-12  # length of a vector that is scaled to length 1


class Pools:
    """Of `hidden_size` numbers each, for `num_slots` running sequences."""

    def __init__(self, hidden_size: int, num_slots: int) -> None:
        self._sums = torch.zeros(num_slots, hidden_size, dtype=torch.float64)

    def results(self, chunks: Iterable[Chunk], hidden: Tensor) -> dict[str, bytes]:
        """By request id, those that are complete now. `hidden` [n, hidden_size] has the rows of all chunks in order."""
        found, at = dict[str, bytes](), 0
        for chunk in chunks:
            if not chunk.sequence.draws:
                rows = hidden[at : at + chunk.num_tokens][_wanted(chunk)]
                result = self.add(chunk, rows)
                if result is not None:
                    found[chunk.sequence.id] = result
            at += chunk.num_tokens
        return found

    def add(self, chunk: Chunk, rows: Tensor) -> bytes | None:
        """Take in the rows of a chunk that `wanted_rows` tells of; the result if they are the last."""
        sequence, rows = chunk.sequence, rows.double().cpu()
        end = chunk.start + chunk.num_tokens
        if sequence.request.pooling == "mean":
            total = self._sums[sequence.slot]
            if chunk.start == 0:
                total.zero_()
            total.copy_(torch.cat([total[None], rows]).cumsum(0)[-1])
            rows = total[None] / end
        return as_bytes(rows[-1] / rows[-1].norm().clamp(min=LEAST)) if end == sequence.num_total else None


def wanted_rows(chunk: Chunk) -> range:
    """Which of a chunk's rows its sequence's vector is made of."""
    return range(chunk.num_tokens)[_wanted(chunk)] if not chunk.sequence.draws else range(0)


def as_bytes(numbers: Tensor) -> bytes:
    """As float32, little-endian."""
    packed: bytes = numbers.float().cpu().numpy().astype("<f4").tobytes()
    return packed


def _wanted(chunk: Chunk) -> slice:
    match chunk.sequence.request.pooling:
        case "mean":
            return slice(None)
        case "cls":
            return slice(0, 1)
        case _:
            return slice(chunk.num_tokens - 1, None)
