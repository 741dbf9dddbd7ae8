"""What one tenant may do at a time and in a minute, and what of that is left. It knows no keys, no HTTP, no queue.

The books are this process's own: with several API processes each grants the limits by itself.

Ledger. A visit counts as open from `enter` to `leave`. `reserve` takes the most tokens that it can use; `leave` gives
back what it did not use, if `used` has said how many that were. A request that goes on without its visitor (in the
background, or read by nobody) keeps all that was reserved, and no longer counts as open.
"""

import math
import time
from collections.abc import Callable

from service.errors import RateLimited
from service.keys import Tenant

MINUTE_S = 60.0
VISIT = "millrace.visit"  # in a scope: the `Visit` of whoever has limits
BUSY_RETRY_S = 1  # an open request may end at any time

Clock = Callable[[], float]


class Bucket:
    """So many a minute, all of a minute's at once if nothing was taken for a minute. The clock gives monotonic
    seconds."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left, self._seen_s = float(per_minute), clock()

    def wait_s(self, amount: float) -> float:
        """How long until `amount` can be taken; what is more than a minute's is given to whoever took nothing for a
        minute."""
        return max(0.0, (min(amount, self.per_minute) - self.left()) * MINUTE_S / self.per_minute)

    def take(self, amount: float) -> None:
        """Below zero if need be; below 0 it is given back."""
        self._left = min(self.left() - amount, float(self.per_minute))

    def left(self) -> float:
        """What can be taken now."""
        now_s = self._clock()
        self._left += (now_s - self._seen_s) * self.per_minute / MINUTE_S
        self._left, self._seen_s = min(self._left, float(self.per_minute)), now_s
        return self._left


class Account:
    """The books of one tenant."""

    def __init__(self, tenant: Tenant, clock: Clock) -> None:
        self.num_open, self._clock = 0, clock
        self.set(tenant)

    def set(self, tenant: Tenant) -> None:
        """From now on these limits; every minute begins anew."""
        self.tenant = tenant
        self.requests = None if tenant.requests_per_minute is None else Bucket(tenant.requests_per_minute, self._clock)
        self.tokens = None if tenant.tokens_per_minute is None else Bucket(tenant.tokens_per_minute, self._clock)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left, in the words that clients of OpenAI know."""
        told = []
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                told += [
                    (f"x-ratelimit-limit-{name}", str(bucket.per_minute)),
                    (f"x-ratelimit-remaining-{name}", str(max(0, int(bucket.left())))),
                    (f"x-ratelimit-reset-{name}", f"{bucket.wait_s(bucket.per_minute):.3f}s"),
                ]
        return [(name.encode(), value.encode()) for name, value in told]


class Accounts:
    """Of all tenants."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._accounts: dict[str, Account] = {}
        self._clock = clock

    def of(self, tenant: Tenant) -> Account:
        """Its account, by the limits that hold now."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant, self._clock)
        elif account.tenant != tenant:
            account.set(tenant)
        return account


class Visit:
    """What one client request takes of its tenant's account."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._is_open, self._num_reserved = False, 0
        self.used: Callable[[], int | None] = lambda: None  # tokens; None: all that was reserved

    def enter(self) -> None:
        """One more request. Raises `RateLimited`, and then it does not count."""
        account, limit = self._account, self._account.tenant.max_concurrent
        if limit is not None and account.num_open >= limit:
            raise RateLimited(f"{limit} requests at a time", BUSY_RETRY_S)
        if account.requests is not None:
            self._take(account.requests, 1, "requests")
        account.num_open += 1
        self._is_open = True

    def reserve(self, num_tokens: int) -> None:
        """The most that the request can use, of prompt and answers. Raises `RateLimited`."""
        if self._account.tokens is not None:
            self._take(self._account.tokens, num_tokens, "tokens")
            self._num_reserved = num_tokens

    def leave(self) -> None:
        """Whatever came of it. May be called without `enter`, and again."""
        if self._is_open:
            self._is_open = False
            self._account.num_open -= 1
        num_reserved, self._num_reserved = self._num_reserved, 0
        num_used = self.used()
        if self._account.tokens is not None and num_reserved and num_used is not None:
            self._account.tokens.take(num_used - num_reserved)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The account's."""
        return self._account.headers()

    def _take(self, bucket: Bucket, amount: int, what: str) -> None:
        wait_s = bucket.wait_s(amount)
        if wait_s > 0:
            raise RateLimited(f"{bucket.per_minute} {what} a minute", math.ceil(wait_s))
        bucket.take(amount)
