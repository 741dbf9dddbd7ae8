"""When an engine counts as hung: no progress although it has work, while Redis takes what it makes."""

from service.work import Watchdog
from tests.service.helpers_broker import FakeClock


class Looked:
    """A watchdog that ends a process after 30 s, with what it looks at."""

    def __init__(self) -> None:
        self.clock, self.progress_age_s, self.away_s = FakeClock(), 0.0, 0.0
        self.dog = Watchdog(lambda: self.progress_age_s, lambda: self.away_s, 30.0, self.clock)

    def after(self, seconds: float, *, idle: bool = False, away: bool = False) -> bool:
        """Whether it bites after so many more seconds like this, looked at once a second."""
        for _ in range(int(seconds)):
            self.clock.advance(1.0)
            self.progress_age_s = 0.0 if idle else self.progress_age_s + 1.0
            self.away_s = self.away_s + 1.0 if away else 0.0
            if self.dog.hangs():
                return True
        return False


def test_an_engine_without_a_step_for_too_long_hangs() -> None:
    looked = Looked()
    assert not looked.after(30)
    assert looked.after(1)


def test_an_idle_engine_does_not_hang() -> None:
    assert not Looked().after(1000, idle=True)


def test_an_engine_whose_results_redis_does_not_take_does_not_hang() -> None:
    looked = Looked()
    assert not looked.after(1000, away=True)
    assert not looked.after(30), "Redis is back, and what waited has to be written first"
    assert looked.after(2)
