"""Who owns which cache block: reference counts over block numbers.

It knows numbers only: no tensors (`store.py` has them), no sequences. A block may have several owners, so that
sequences with a common beginning can share it; it is free again when the last one has given it back.
"""

from collections.abc import Iterable


class OutOfBlocks(Exception):
    """More blocks were asked for than are free. Nothing was taken."""


class BlockPool:
    """`num_blocks` blocks, numbered from 0, all free at first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_owners = [0] * num_blocks
        # A stack: the block freed last is taken first, while its memory is still warm.
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, num: int) -> list[int]:
        """`num` free blocks, each now with one owner, the caller. Raises `OutOfBlocks`."""
        if num > len(self._free):
            raise OutOfBlocks(f"{num} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        # Ledger: free -> one owner.
        taken = [self._free.pop() for _ in range(num)]
        for block in taken:
            self._num_owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """The caller becomes one more owner of blocks that somebody owns."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is shared but free"
            # Ledger: n owners -> n + 1.
            self._num_owners[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """The caller is no longer an owner of these blocks."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is given back but free"
            # Ledger: n owners -> n - 1; the last one leaving makes it free.
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                self._free.append(block)
