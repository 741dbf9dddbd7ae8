"""How many blocks a sequence needs, and which of its blocks no later token will: block arithmetic over `CacheNeeds`.

It knows numbers of tokens and blocks; why a network looks no further back is the network's affair.
"""

from model.engine.sequence import HOLE, Sequence
from model.kinds import RANDOM_BLOCK, CacheNeeds


class Reach:
    """For sequences of a network with these needs, in blocks of `size` tokens."""

    def __init__(self, needs: CacheNeeds, size: int) -> None:
        self._needs, self._size = needs, size
        self.slides = needs.num_last is not None
        self.num_least = 0  # blocks in which a sequence of any length can go on; 0: it has none
        if needs.num_last != 0:
            self.num_least = self._num_most(1)

    def num_places(self, num_tokens: int) -> int:
        """Items of `Sequence.blocks`, holes included, for the first `num_tokens` tokens."""
        return -(-num_tokens // self._size) if self.num_least else 0

    def num_needed(self, num_tokens: int) -> int:
        """Blocks without which a sequence of so many tokens could not come to its end."""
        return min(self.num_places(num_tokens), self.num_least)

    def num_wanted(self, num_tokens: int, num_at_once: int) -> int:
        """Blocks for all of these tokens and one more, when so many are computed in a step."""
        places = self.num_places(num_tokens)
        return min(places + 1, self._num_most(num_at_once)) if places else 0

    def slide(self, sequence: Sequence) -> list[int]:
        """Blocks that the tokens not yet computed do not need; they are no longer the sequence's, who is not an owner
        of them any more once they are given back."""
        needs, size = self._needs, self._size
        assert needs.num_last is not None, "every block is needed"
        if not sequence.blocks:
            return []
        at = sequence.num_computed
        behind = max(0, at - needs.num_last + 1) // size
        if behind <= sequence.num_slid:
            return []
        kept = {place for block in needs.kept(at) for place in self._places(block)}
        first = -(-needs.num_first // size)
        free, held = list[int](), list[int]()
        for place in (*sequence.held_back, *range(sequence.num_slid, behind)):
            if place < first or place in kept:
                held.append(place)
            else:
                free.append(sequence.blocks[place])
                sequence.blocks[place] = HOLE
        sequence.num_slid, sequence.held_back = behind, held
        return free

    def _places(self, block: int) -> range:
        """Where a random block's tokens are."""
        start = block * RANDOM_BLOCK
        return range(start // self._size, (start + RANDOM_BLOCK - 1) // self._size + 1)

    def _num_most(self, num_at_once: int) -> int:
        """Blocks that a sequence of any length has at most, when so many tokens are computed at once."""
        needs, size = self._needs, self._size
        if needs.num_last is None:
            return 2**62
        if not needs.num_last:
            return 0
        touched = (needs.num_last + num_at_once + size - 3) // size + 1  # a run of tokens may begin in a block's middle
        each = max(len(self._places(block)) for block in range(size))
        num_random = each * sum(num for _, num in needs.randoms)
        return touched + -(-needs.num_first // size) + num_random
