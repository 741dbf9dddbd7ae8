"""Who waits, best rank first. It knows ranks only, and may be a hundred thousand sequences long."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from model.engine.sequence import Sequence

SLACK = 64  # entries of the departed that are nobody's concern


class Line:
    """A heap: adding and taking cost O(log n). Who leaves from the middle stays in it, unseen, until he comes to the
    front or the departed are more than the others. `waits` tells whether an entry is still one that waits."""

    def __init__(self, waits: Callable[[Sequence], bool]) -> None:
        self._waits = waits
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []  # ranks differ, so sequences are never compared
        self._num_left = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_left

    def add(self, sequence: Sequence) -> None:
        """It must not be in the line."""
        heappush(self._heap, (sequence.rank, sequence))

    def head(self) -> Sequence | None:
        """The best rank, None if nobody waits."""
        while self._heap and not self._waits(self._heap[0][1]):
            heappop(self._heap)
            self._num_left -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """The head leaves."""
        heappop(self._heap)

    def left(self) -> None:
        """Somebody of the line does not wait any more; `waits` says so already."""
        self._num_left += 1
        if self._num_left > SLACK + len(self):
            self._heap = [entry for entry in self._heap if self._waits(entry[1])]
            heapify(self._heap)
            self._num_left = 0
