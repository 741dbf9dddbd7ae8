"""The line of those who wait: best rank first, whoever leaves from wherever."""

from hypothesis import given
from hypothesis import strategies as st

from model.engine.line import SLACK, Line
from model.engine.sequence import Sequence
from model.request import Request


def sequence(arrival: int, priority: int = 0) -> Sequence:
    return Sequence(Request(str(arrival), (1,), priority=priority), 10, arrival=arrival)


Moves = st.lists(st.tuples(st.sampled_from(["add", "add", "pop", "leave"]), st.integers(0, 2), st.integers(0, 99)))


@given(Moves)
def test_the_head_is_always_the_best_of_those_who_wait(moves: list[tuple[str, int, int]]) -> None:
    waiting: list[Sequence] = []
    line = Line(lambda each: each in waiting)
    for at, (move, priority, number) in enumerate(moves):
        if move == "add":
            waiting.append(sequence(at, priority))
            line.add(waiting[-1])
        elif move == "pop" and (head := line.head()):
            waiting.remove(head)
            line.pop()
        elif move == "leave" and waiting:
            del waiting[number % len(waiting)]
            line.left()
        assert len(line) == len(waiting)
        assert line.head() is min(waiting, key=lambda each: each.rank, default=None)


def test_those_who_left_are_not_kept_for_ever() -> None:
    waiting = {sequence(at) for at in range(1000)}
    line = Line(lambda each: each in waiting)
    for each in waiting:
        line.add(each)
    for each in sorted(waiting, key=lambda each: each.rank)[1:]:
        waiting.remove(each)
        line.left()
    assert len(line) == 1 and len(line._heap) <= 2 * SLACK
