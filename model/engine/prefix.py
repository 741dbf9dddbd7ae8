"""What has been computed before: blocks that hold the beginning of a sequence's tokens, found by name and shared.

It owns the names of sequences' blocks and the counts of what was found. It knows no ranks and no budgets: the scheduler
asks, and says what is computed. Only full blocks are shared, and of no sequence the block with its last token: that one
must be computed to draw the next id. So nobody ever writes into a block that another reads.
"""

from collections.abc import Callable

from model.cache.blocks import BlockPool
from model.cache.names import following, root
from model.engine.sequence import Sequence


class Prefixes:
    """Finds what was computed, and knows what is being computed just now: who needs the same had better wait a step.

    Ledger. A name is promised from the plan that computes its block until that plan is committed, by `promise` and
    `computed`. The promise of a sequence that has ended is void: its part of the plan may never be committed. `owns`
    tells who has not.
    """

    def __init__(self, pool: BlockPool, block_size: int, owns: Callable[[Sequence], bool]) -> None:
        self._pool, self._size, self._owns = pool, block_size, owns
        self._promised: dict[bytes, Sequence] = {}
        self.num_asked = 0  # prompt tokens of sequences that were looked up, each once
        self.num_found = 0  # of these, found

    def matching(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its next tokens, as far as there are any. They may be free: who wants them must `adopt` them
        before the next block is taken."""
        found: list[int] = []
        at = len(sequence.blocks)
        if sequence.num_computed != at * self._size or not sequence.shares:
            return found
        for index in range(at, self._num_shareable(sequence)):
            block = self._pool.find(self._name(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def adopt(self, sequence: Sequence, found: list[int]) -> None:
        """The sequence is an owner of these too, which are what `matching` gave, and has these tokens computed."""
        if sequence.num_seen < 0 and sequence.shares:
            sequence.num_seen = 0
            self.num_asked += sequence.num_prompt
        if not found:
            return
        # Ledger: n owners -> n + 1. A new list, since a runner may have told the device the old one.
        self._pool.share(found)
        sequence.blocks = [*sequence.blocks, *found]
        before = max(sequence.num_computed, sequence.num_seen)
        sequence.num_computed += len(found) * self._size
        num_new = max(0, min(sequence.num_computed, sequence.num_prompt) - before)
        sequence.num_cached += num_new
        self.num_found += num_new

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether its next block is being computed for another one."""
        at = len(sequence.blocks)
        if (
            not self._promised
            or not sequence.shares
            or sequence.num_computed != at * self._size
            or at >= self._num_shareable(sequence)
        ):
            return False
        other = self._promised.get(self._name(sequence, at))
        return other is not None and other is not sequence and self._owns(other)

    def promise(self, sequence: Sequence, start: int, end: int) -> None:
        """Its tokens from `start` to before `end` are about to be computed."""
        for index in range(start // self._size, end // self._size):
            name = self._name(sequence, index)
            if not self._owns(self._promised.setdefault(name, sequence)):
                self._promised[name] = sequence

    def computed(self, sequence: Sequence, start: int, end: int) -> None:
        """These are computed, and their numbers are finite: the blocks that they fill can be found, as far as the
        sequence still has them."""
        for index in range(start // self._size, end // self._size):
            name = self._name(sequence, index)
            if self._promised.get(name) is sequence:
                del self._promised[name]
            if index < len(sequence.blocks):
                self._pool.name(sequence.blocks[index], name)

    def _num_shareable(self, sequence: Sequence) -> int:
        return (sequence.num_total - 1) // self._size

    def _name(self, sequence: Sequence, index: int) -> bytes:
        names, size = sequence.names, self._size
        while len(names) <= index:
            request, at = sequence.request, len(names) * size
            before = names[-1] if names else root(request.tenant, request.cache_salt)
            names.append(following(before, sequence.ids(at, at + size)))
        return names[index]
