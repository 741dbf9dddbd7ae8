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


def test_a_named_block_is_found_until_it_is_taken_for_something_else() -> None:
    pool = BlockPool(2)
    [block] = pool.take(1)
    pool.name(block, b"a")
    assert pool.find(b"a") == block
    pool.give_back([block])
    assert (pool.find(b"a"), pool.num_free) == (block, 2)
    pool.share([block])
    assert (pool.num_owners(block), pool.num_free) == (1, 1)
    pool.give_back([block])
    pool.take(2)
    assert pool.find(b"a") is None


def test_blank_blocks_are_taken_first_then_those_kept_longest_ends_before_beginnings() -> None:
    pool = BlockPool(5)
    first, second = pool.take(2), pool.take(2)
    for block in first + second:
        pool.name(block, b"%d" % block)
    pool.give_back(first)
    pool.give_back(second)
    pool.share(first[:1])
    pool.give_back(first[:1])
    assert pool.take(5)[1:] == [first[1], second[1], second[0], first[0]]


def test_the_first_block_of_a_name_stays_the_one_to_find() -> None:
    pool = BlockPool(2)
    blocks = pool.take(2)
    for block in blocks:
        pool.name(block, b"a")
    pool.forget(blocks[1:])
    assert pool.find(b"a") == blocks[0]
    pool.give_back(blocks)
    pool.forget(blocks)
    assert pool.find(b"a") is None and pool.num_free == 2


Calls = st.lists(
    st.tuples(st.sampled_from(["take", "share", "give_back", "name", "find", "forget"]), st.integers(0, 9))
)


@given(st.integers(0, 6), Calls)
def test_free_and_owned_always_add_up(num_blocks: int, calls: list[tuple[str, int]]) -> None:
    pool, owners, named = BlockPool(num_blocks), Counter[int](), dict[bytes, int]()
    for call, number in calls:
        name = b"%d" % (number % 3)
        block = sorted(owners)[number % len(owners)] if owners else None
        if call == "take" and number <= pool.num_free:
            taken = pool.take(number)
            assert not owners.keys() & set(taken)
            owners.update(taken)
            named = {each: found for each, found in named.items() if found not in taken}
        elif call == "find" and (found := pool.find(name)) is not None:
            pool.share([found])
            owners[found] += 1
        elif call == "name" and block is not None:
            pool.name(block, name)
            if block not in named.values():
                named.setdefault(name, block)
        elif call == "forget" and num_blocks:
            pool.forget([number % num_blocks])
            named = {each: found for each, found in named.items() if found != number % num_blocks}
        elif call in ("share", "give_back") and block is not None:
            getattr(pool, call)([block])
            owners = +(owners + Counter([block]) if call == "share" else owners - Counter([block]))
        assert pool.num_used == len(owners) == num_blocks - pool.num_free
        assert {each: pool.find(each) for each in named} == named
