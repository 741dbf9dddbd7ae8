"""What a process tells of its link to Redis, and of Redis."""

from prometheus_client import CollectorRegistry

from service.broker.redis_metrics import LinkMetrics


def made() -> tuple[LinkMetrics, CollectorRegistry]:
    registry, link = CollectorRegistry(), LinkMetrics(lambda: 2.5)
    registry.register(link)
    return link, registry


def test_round_trips_are_counted_with_their_calls() -> None:
    link, registry = made()
    link.trip(["commit", "commit", "beat"], 0.004)
    link.trip([], 0.002)
    assert registry.get_sample_value("millrace_redis_round_trip_seconds_count") == 2
    assert registry.get_sample_value("millrace_redis_calls_total", {"function": "commit"}) == 2
    assert registry.get_sample_value("millrace_redis_away_seconds") == 2.5


def test_errors_are_told_before_there_is_one() -> None:
    link, registry = made()
    assert registry.get_sample_value("millrace_redis_errors_total", {"kind": "ConnectionError"}) == 0
    link.failed("OutOfMemoryError")
    assert registry.get_sample_value("millrace_redis_errors_total", {"kind": "OutOfMemoryError"}) == 1


def test_facts_are_told_while_they_are_known() -> None:
    link, registry = made()
    assert registry.get_sample_value("millrace_redis_memory_bytes") is None
    link.know({"used_memory": 7, "maxmemory": 0, "connected_clients": 3, "redis_version": "7.0.15"})
    assert registry.get_sample_value("millrace_redis_memory_bytes") == 7
    assert registry.get_sample_value("millrace_redis_max_memory_bytes") == 0
    link.know({})
    assert registry.get_sample_value("millrace_redis_clients") is None
