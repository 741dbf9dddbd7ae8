"""What stands behind the door: nothing while the model loads, then a model and a broker."""

from collections.abc import Callable

from service.broker.base import RequestSide
from service.errors import Unavailable
from service.http.intake import Served
from service.traces import Traces

LOADING = "loading"


class Backend:
    """What stands behind the door: nothing while the model loads, then a model and a broker.

    `watch` says why no request should be sent here now (draining, stuck, no worker), for `/ready`; `refuse` why one
    that comes all the same is refused, where that is less strict. Both give None for no reason. `facts` are told by
    `/ready` when it is. The composition root owns this object.
    """

    def __init__(
        self,
        watch: Callable[[], str | None] = lambda: None,
        refuse: Callable[[], str | None] | None = None,
        facts: Callable[[], dict[str, object]] = dict,
    ) -> None:
        self.served: Served | None = None
        self.broker: RequestSide | None = None
        self._watch, self._refuse, self.facts = watch, refuse, facts
        self.traces: Traces | None = None
        self.look: Callable[[list[int]], list[list[list[float]]]] | None = None  # for `/attention`, where it is on

    def loaded(self, served: Served, broker: RequestSide) -> None:
        """From now on requests are served, with this. May be called again; requests that run keep what they have."""
        self.served, self.broker = served, broker

    def ready(self) -> str | None:
        """None, or the reason why not."""
        return LOADING if self.served is None else self._watch()

    def open(self) -> tuple[Served, RequestSide]:
        """What is loaded, ready or not. Raises `Unavailable`."""
        if self.served is None or self.broker is None:
            raise Unavailable(LOADING)
        return self.served, self.broker

    def get(self) -> tuple[Served, RequestSide]:
        """For a new request or reader. Raises `Unavailable` if it is refused."""
        opened = self.open()
        reason = (self._refuse or self._watch)()
        if reason is not None:
            raise Unavailable(reason)
        return opened
