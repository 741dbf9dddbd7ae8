"""The brokers that the contract suite runs on."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.service.helpers_redis_rig import redis
from tests.service.helpers_rig import Limits, MakeBroker, Rig, memory

MAKERS = {"memory": memory, "redis": redis}


@pytest.fixture(params=MAKERS)
async def make_broker(request: pytest.FixtureRequest) -> AsyncIterator[MakeBroker]:
    """Makes brokers of each kind, and closes them after the test."""
    async with AsyncExitStack() as stack:

        async def make(limits: Limits | None = None) -> Rig:
            return await stack.enter_async_context(MAKERS[request.param](limits or Limits()))

        yield make
