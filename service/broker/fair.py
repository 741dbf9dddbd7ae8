"""Who is next: start-time fair queueing between tenants, with two priorities. It knows no clock and no broker.

Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996. The rules, which `functions.lua` keeps too:

1. A request of priority below 0 is in the class `ahead`, any other in the class `rest`. A class has a virtual time V,
   and in it each tenant has a finish tag F. Both start at 0.
2. A new request gets the tag S = max(V, F); then F = S + cost / weight of the tenant.
3. Of a class, the smallest tag is taken first; then V = max(V, its tag). Equal tags, which only different tenants can
   have, are taken as they arrived (a sorted set of Redis takes them by id).
4. When the last request that waits in a class is taken or removed, V = the largest F there ever was in it: nobody
   waited, so nobody has an advance or a debt.
5. `ahead` goes first, unless the first of `rest` was submitted at least `AGEING_S` before the first of `ahead`.
6. A request that is put back keeps its tag, and so its place. One that is removed stays charged to its tenant.
7. An F that is not above V says nothing and is forgotten.

So a tenant that comes anew waits for at most one request of each other tenant, however many those have in the queue.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from math import inf

from model.request import Request
from service.broker.base import AGEING_S


def cost(request: Request) -> int:
    """What a request is charged, in tokens: the most it can take."""
    return len(request.asked_ids) + request.sampling.max_tokens


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """The place of one request: valid in the queue that gave it, waiting or taken."""

    tag: float
    arrival: int
    id: str = field(compare=False)
    ahead: bool = field(compare=False)
    submitted_s: float = field(compare=False)


class FairQueue:
    """Everything that waits. A tenant without an entry in `weights` (all above 0) has the weight 1; read anew for each.

    Finding a place takes O(log n); making and closing the gap is one copy inside a list.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = {} if weights is None else weights
        self._ahead, self._rest = _Class(), _Class()
        self._by_age: list[tuple[float, int]] = []  # submitted_s, arrival
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def num_tenants(self) -> int:
        """How many finish tags are remembered."""
        return len(self._ahead.finish) + len(self._rest.finish)

    def add(self, id: str, tenant: str, cost: float, submitted_s: float, priority: int = 0) -> Ticket:
        """A new request, `cost` above 0."""
        ahead = priority < 0
        tag = self._class(ahead).charge(tenant, cost / self._weights.get(tenant, 1.0))
        ticket = Ticket(tag, self._num_arrived, id, ahead, submitted_s)
        self._num_arrived += 1
        self.put_back(ticket)
        return ticket

    def put_back(self, ticket: Ticket) -> None:
        """What was taken waits again, in its old place."""
        insort(self._class(ticket.ahead).waiting, ticket)
        insort(self._by_age, (ticket.submitted_s, ticket.arrival))

    def take(self) -> Ticket:
        """The next one. Raises `IndexError` if nothing waits."""
        ahead, rest = self._ahead.waiting, self._rest.waiting
        aged = ahead and rest and rest[0].submitted_s + AGEING_S <= ahead[0].submitted_s
        ticket = rest[0] if aged or not ahead else ahead[0]
        self.remove(ticket)
        self._class(ticket.ahead).advance(ticket.tag)
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Take this one out, which waits, for it is wanted no more."""
        of_class = self._class(ticket.ahead)
        del of_class.waiting[bisect_left(of_class.waiting, ticket)]
        del self._by_age[bisect_left(self._by_age, (ticket.submitted_s, ticket.arrival))]
        of_class.advance(0.0)

    def position(self, ticket: Ticket) -> int:
        """How many wait before this one, leaving rule 5's exception aside."""
        before = bisect_left(self._class(ticket.ahead).waiting, ticket)
        return before if ticket.ahead else before + len(self._ahead.waiting)

    def oldest_s(self) -> float:
        """When the one that waits longest was submitted; infinity if nothing waits."""
        return self._by_age[0][0] if self._by_age else inf

    def _class(self, ahead: bool) -> "_Class":
        return self._ahead if ahead else self._rest


class _Class:
    """One class: who waits in it, and what it knows of tenants. `by_finish` has one entry for each tenant in `finish`,
    which may be older than its F; it is looked at, and renewed, when V has reached it."""

    def __init__(self) -> None:
        self.waiting: list[Ticket] = []  # sorted
        self.virtual_time = self.largest_finish = 0.0
        self.finish: dict[str, float] = {}
        self.by_finish: list[tuple[float, str]] = []  # a heap

    def charge(self, tenant: str, share: float) -> float:
        """The tag of a tenant's new request."""
        tag = max(self.virtual_time, self.finish.get(tenant, 0.0))
        if tenant not in self.finish:
            heappush(self.by_finish, (tag + share, tenant))
        self.finish[tenant] = tag + share
        self.largest_finish = max(self.largest_finish, tag + share)
        return tag

    def advance(self, tag: float) -> None:
        """Follow what has left, and forget the tenants that V has passed."""
        self.virtual_time = max(self.virtual_time, tag if self.waiting else self.largest_finish)
        while self.by_finish and self.by_finish[0][0] <= self.virtual_time:
            tenant = self.by_finish[0][1]
            if self.finish[tenant] <= self.virtual_time:
                del self.finish[tenant]
                heappop(self.by_finish)
            else:
                heapreplace(self.by_finish, (self.finish[tenant], tenant))
