"""How many tokens of prompts go into a step beside those who decode, judged by how long steps have taken.

A prompt's tokens lengthen the step for everyone in it. Each sequence that reads its prompt is worth as much time as one
that decodes, and all that read together at least as much as all that decode: a prompt that arrives among many makes
their steps twice as long, many that arrive among few are not held up by these. It knows no sequences and no clock, and
changes what is computed together, never what comes out.
"""

from dataclasses import dataclass

LEAST = 16  # tokens of prompts in a step, however slow: everyone gets on
WEIGHT = 0.25  # of a new measurement against all before
MOST_JUMP = 2.0  # an outlier counts as so many times what was expected, at most


@dataclass(slots=True)
class _Mean:
    """A moving mean; 0 while nothing is known."""

    value: float = 0.0

    def add(self, value: float) -> None:
        self.value += WEIGHT * (min(value, MOST_JUMP * self.value) - self.value) if self.value else value


class Pace:
    """`most` tokens go into a step at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._decoding_s: dict[int, _Mean] = {}  # of a step in which so many decode, by the power of two
        self._read_s = _Mean()  # of one more token of a prompt

    def told(self, num_decoding: int, num_read: int, seconds: float) -> None:
        """A step has taken so long."""
        if not num_read:
            self._decoding_s.setdefault(num_decoding.bit_length(), _Mean()).add(seconds)
            return
        beside_s = self._decode_s(num_decoding) if num_decoding else 0.0
        if seconds > beside_s:
            self._read_s.add((seconds - beside_s) / num_read)

    def budget(self, num_decoding: int, num_reading: int) -> int:
        """Tokens of the next step, in which so many decode, one token each, and so many read."""
        decode_s = self._decode_s(num_decoding)
        if not num_decoding or not num_reading or not decode_s or not self._read_s.value:
            return self._most
        share = max(1.0, num_reading / num_decoding)
        return min(self._most, num_decoding + max(LEAST, int(share * decode_s / self._read_s.value)))

    def _decode_s(self, num_decoding: int) -> float:
        """As known, or of the number nearest to it of which something is known; 0 if nothing is."""
        size = num_decoding.bit_length()
        known = self._decoding_s.get(size)
        if known is None and self._decoding_s:
            known = self._decoding_s[min(self._decoding_s, key=lambda other: abs(other - size))]
        return known.value if known else 0.0
