"""Who owns which cache block, and under which name its content can be found again.

It knows numbers and names only: no tensors (`store.py` has them), no sequences. A block may have several owners, so
that sequences with a common beginning can share it; it is free again when the last one has given it back. A full block
whose content is computed can be given a name, and a free block keeps its name until it is needed for something else.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """More blocks were asked for than are free. Nothing was taken."""


class BlockPool:
    """`num_blocks` blocks, numbered from 0, all free at first.

    Ledger. A block is owned (it has owners), kept (free, with a name) or blank (free, without). `take` makes blank and
    then kept blocks owned, `share` kept ones, and `give_back` makes them kept or blank again. Whatever takes a name
    away from a kept block makes it blank.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_owners = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}
        # A stack: the block freed last is taken first, while its memory is still warm.
        self._blank = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[int, None] = OrderedDict()  # the one given back longest ago is first

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def take(self, num: int) -> list[int]:
        """`num` free blocks, each now with one owner, the caller, and without a name. Raises `OutOfBlocks`."""
        if num > self.num_free:
            raise OutOfBlocks(f"{num} blocks wanted, {self.num_free} of {self.num_blocks} free")
        # Ledger: blank, or else kept longest -> one owner.
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(num)]
        for block in taken:
            self._num_owners[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """The caller becomes one more owner of blocks that are owned or kept."""
        for block in blocks:
            if not self._num_owners[block]:
                assert block in self._kept, f"block {block} is shared but free"
                # Ledger: kept -> owned.
                del self._kept[block]
            # Ledger: n owners -> n + 1.
            self._num_owners[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """The caller is no longer an owner of these blocks. Of those kept the last is evicted first: without those
        before it, nobody could find it."""
        for block in reversed(blocks):
            assert self._num_owners[block] > 0, f"block {block} is given back but free"
            # Ledger: n owners -> n - 1; the last one leaving makes it kept or blank.
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if self._names[block] is None:
                    self._blank.append(block)
                else:
                    self._kept[block] = None

    def name(self, block: int, name: bytes) -> None:
        """From now on an owned block can be found. If another has this name already, that one stays the one to find."""
        assert self._num_owners[block] > 0, f"block {block} is named but free"
        if self._names[block] is None and name not in self._named:
            self._names[block] = name
            self._named[name] = block

    def find(self, name: bytes) -> int | None:
        """The block of this name, owned or kept."""
        return self._named.get(name)

    def num_owners(self, block: int) -> int:
        """0: it is free."""
        return self._num_owners[block]

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the names of blocks away: nobody finds them any more. Who owns them still does."""
        for block in blocks:
            name = self._names[block]
            if name is None:
                continue
            del self._named[name]
            self._names[block] = None
            if block in self._kept:
                # Ledger: kept -> blank.
                del self._kept[block]
                self._blank.append(block)

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        name = self._names[block]
        assert name is not None, f"block {block} is kept without a name"
        del self._named[name]
        self._names[block] = None
        return block
