"""How many tokens of prompts go into a step beside those who decode, judged by how long steps have taken.

A prompt's tokens lengthen the step for everyone in it. All that read together are worth almost as much time as all that
decode: a prompt that arrives among many makes their steps almost twice as long. Where more than a few read, they are
worth more in proportion: a burst that was read slowly would leave the steps until then half empty, and everyone late.
It knows no sequences and no clock, and changes what is computed together, never what comes out.
"""

import math
from collections import deque
from statistics import median

LEAST = 16  # tokens of prompts in a step, however slow: everyone gets on
ENOUGH = 128  # where steps get long by reading at all, so much for it at most
BURST = 4.0  # each that reads beside a first one is worth the time of so many that decode
SHARE = 0.7  # of the time of those who decode, for those who read: what is predicted is not always what comes
KEEP = 0.9  # weight of a measurement, against that of the next one
MOST_JUMP = 3.0  # an outlier counts as so many times what was expected, at most
PROBE, PROBES = 0.25, 8  # so much less is read in one step of so many: one size alone would not tell what a token costs
STEPS = 9  # that a typical one is judged by


class Pace:
    """`most` tokens go into a step at most. A token at the position `half` takes twice the work of a text's first one:
    without that, a prompt's growing cost would look like one that no smaller piece can lower."""

    def __init__(self, most: int, half: float = math.inf) -> None:
        self._most, self._half = most, half
        self._decoding_s: dict[int, deque[float]] = {}  # steps in which so many decode, by the power of two
        # Of steps that read: their number, work, added seconds, work squared, work times seconds; all fading.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._num_told = 0  # steps that read

    def told(self, num_decoding: int, num_read: int, seconds: float, positions: int = 0) -> None:
        """A step has taken so long; `positions`: the sum of those of the tokens read."""
        if not num_read:
            self._decoding_s.setdefault(num_decoding.bit_length(), deque(maxlen=STEPS)).append(seconds)
            return
        added_s = max(0.0, seconds - (self._decode_s(num_decoding) if num_decoding else 0.0))
        fixed_s, token_s = self._reading()
        work = num_read + positions / self._half
        if token_s:
            added_s = min(added_s, MOST_JUMP * (fixed_s + token_s * work))
        num, total, total_s, squares, products = (KEEP * each for each in self._sums)
        self._sums = (
            num + 1,
            total + work,
            total_s + added_s,
            squares + work * work,
            products + work * added_s,
        )
        self._num_told += 1

    def budget(self, num_decoding: int, num_reading: int, position: int = 0) -> int:
        """Tokens of the next step, in which so many decode, one token each, and so many read; the first of these from
        `position` on."""
        if not num_decoding or not num_reading:
            return self._most
        decode_s, (fixed_s, token_s) = self._decode_s(num_decoding), self._reading()
        if not decode_s or not token_s:
            return self._most
        room_s = SHARE * max(1.0, BURST * (num_reading - 1) / num_decoding) * decode_s - fixed_s
        # Where reading takes too long in any case, as much is read as takes as long again: in smaller pieces it would
        # only take more steps, and these hardly less time.
        work = room_s / token_s if room_s > 0 else min(ENOUGH, fixed_s / token_s)
        num_read = max(LEAST, work / (1 + position / self._half))
        if self._num_told % PROBES == 0 and num_decoding + num_read < self._most:
            num_read *= PROBE
        return min(self._most, num_decoding + int(num_read))

    def _reading(self) -> tuple[float, float]:
        """Seconds that reading adds to a step in any case, and for each token at the beginning of a text: a line
        through what was measured."""
        num, work, total_s, squares, products = self._sums
        if not total_s:
            return 0.0, 0.0
        mean_s, spread = total_s / work, num * squares - work * work
        slope = (num * products - work * total_s) / spread if spread > 1e-3 * work * work else mean_s
        slope = min(max(slope, mean_s / 3), mean_s)
        return (total_s - slope * work) / num, slope

    def _decode_s(self, num_decoding: int) -> float:
        """As known, or of the number nearest to it of which something is known; 0 if nothing is."""
        if not self._decoding_s:
            return 0.0
        size = num_decoding.bit_length()
        return median(self._decoding_s[min(self._decoding_s, key=lambda other: abs(other - size))])
