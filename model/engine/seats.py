"""Which line of the device's table of blocks belongs to which sequence.

The host sends a sequence's line once, when it takes its seat; after that each row that is computed enters its own
block. A seat is taken from whoever was not computed for longest, and comes back with a fresh line when needed.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from model.engine.sequence import Sequence


@dataclass(slots=True)
class _Seat:
    number: int
    blocks: list[int]  # the sequence's own list when it sat down: after a preemption it has another


class Seats:
    """`tables` int32 [num + 1, width] on the device. The last line, `spare`, is for rows of padding."""

    def __init__(self, num: int, width: int, device: torch.device) -> None:
        self.tables = torch.zeros(num + 1, width, dtype=torch.int32, device=device)
        self.spare = num
        self._free = list(range(num))
        self._taken: dict[Sequence, _Seat] = {}  # used longest ago first

    def of(self, sequences: Seq[Sequence]) -> list[int]:
        """The seats of all sequences of a step, at most `num`. Their blocks are in `tables` when the device has done
        what it was asked for before."""
        for sequence in sequences:
            if sequence in self._taken:
                self._taken[sequence] = self._taken.pop(sequence)
        return [self._seat(sequence) for sequence in sequences]

    def _seat(self, sequence: Sequence) -> int:
        seat = self._taken.get(sequence)
        if seat is None:
            number = self._free.pop() if self._free else self._taken.pop(next(iter(self._taken))).number
            seat = self._taken[sequence] = _Seat(number, [])
        if seat.blocks is not sequence.blocks:
            seat.blocks = sequence.blocks
            line = torch.tensor(sequence.blocks, dtype=torch.int32)
            line = line.pin_memory() if self.tables.is_cuda else line
            self.tables[seat.number, : len(line)].copy_(line, non_blocking=True)
        return seat.number
