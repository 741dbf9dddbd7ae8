"""Which ids a text has, for penalties. A text only grows, so each id is looked at once, however long it becomes."""

from array import array
from collections import Counter
from collections.abc import Sequence


class Seen:
    """Of a prompt and what was drawn after it, as far as `update` has been told."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._known = set(prompt_ids)
        self._num_drawn = 0
        self.ids = array("q", self._known)  # each once, in no order
        self.counts = Counter[int]()  # of what was drawn

    def update(self, output_ids: Sequence[int]) -> "Seen":
        """Itself, once it knows all of `output_ids`: what it was told before, and perhaps more."""
        new = output_ids[self._num_drawn :]
        self._num_drawn += len(new)
        self.counts.update(new)
        for token_id in new:
            if token_id not in self._known:
                self._known.add(token_id)
                self.ids.append(token_id)
        return self
