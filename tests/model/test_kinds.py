"""The words of kinds, and which random blocks a stream keeps."""

from collections import Counter

import pytest

from model.kinds import KINDS, RANDOM_BLOCK, CacheNeeds, combine, random_blocks, read_kind


@pytest.mark.parametrize("name", KINDS)
def test_a_word_is_read_back(name: str) -> None:
    kind = read_kind(name)
    assert read_kind(kind.word) == kind
    assert type(kind) is KINDS[name]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sparse", "'sparse': expected one of full, window"),
        ("window:", "size ''"),
        ("window:0", "size '0', expected a whole number from 1"),
        ("window:8:x", "num_global 'x'"),
        ("lstm:8:1", "expected at most lstm:width"),
        ("linear:99999999", "num_features '99999999'"),
    ],
)
def test_a_word_that_says_nothing_is_refused(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_kind(word)


def test_random_blocks_lie_behind_the_window_and_are_never_wanted_back() -> None:
    held: list[set[int]] = [set(), set()]
    gone: list[set[int]] = [set(), set()]
    for position in range(20_000):
        blocks = random_blocks(100, 2, position)
        for draw, block in enumerate(blocks):
            assert block < 0 or (block + 1) * RANDOM_BLOCK <= position - 100 + 1
            assert block not in gone[draw]
            gone[draw] |= held[draw] - {block}
            held[draw] = {block}
    assert all(len(found) > 4 for found in gone)  # it does change


def test_random_blocks_are_spread_over_the_past() -> None:
    position = 40 * RANDOM_BLOCK + 64
    counts = Counter(random_blocks(64, 4000, position))
    assert set(counts) == set(range(40))
    assert max(counts.values()) < 1.6 * 4000 / 40
    assert random_blocks(64, 2, 64) == (-1, -1)


def test_needs_of_layers_together() -> None:
    window, memory = read_kind("window:40:4:1").needs(), read_kind("recurrent-memory:30:50").needs()
    assert combine([window, memory, read_kind("linear").needs()]) == CacheNeeds(4, 80, ((40, 1),), False)
    assert combine([window, read_kind("full").needs()]).num_last is None
    assert combine([read_kind("lstm").needs()]) == CacheNeeds(0, 0, (), False)
