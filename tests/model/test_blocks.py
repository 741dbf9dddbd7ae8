from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.cache.blocks import BlockPool, OutOfBlocks


def test_blocks_taken_are_distinct_and_come_back() -> None:
    pool = BlockPool(4)
    first, second = pool.take(1), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.num_free, pool.num_used) == (0, 4)
    pool.give_back(second)
    assert (pool.num_free, pool.num_used) == (3, 1)


def test_too_many_blocks_are_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(4)
    pool.take(2)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 of 4 free"):
        pool.take(3)
    assert pool.num_free == 2


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    pool.share(blocks)
    pool.give_back(blocks)
    assert pool.num_free == 0
    pool.give_back(blocks)
    assert pool.num_free == 2


def test_giving_back_or_sharing_a_free_block_is_our_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="given back but free"):
        pool.give_back(blocks)
    with pytest.raises(AssertionError, match="shared but free"):
        pool.share(blocks)


@given(st.integers(0, 6), st.lists(st.tuples(st.sampled_from(["take", "share", "give_back"]), st.integers(0, 9))))
def test_free_and_owned_always_add_up(num_blocks: int, calls: list[tuple[str, int]]) -> None:
    pool, owners = BlockPool(num_blocks), Counter[int]()
    for name, number in calls:
        if name == "take" and number <= pool.num_free:
            taken = pool.take(number)
            assert not owners.keys() & set(taken)
            owners.update(taken)
        elif name != "take" and owners:
            block = sorted(owners)[number % len(owners)]
            getattr(pool, name)([block])
            owners = +(owners + Counter([block]) if name == "share" else owners - Counter([block]))
        assert pool.num_used == len(owners) == num_blocks - pool.num_free
