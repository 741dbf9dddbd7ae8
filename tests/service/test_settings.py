"""Flags over environment over defaults; anything unknown or bad refuses."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, SettingsError, shown_url

URL = "redis://worker:s3cret@queue.example:6380/2"


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MILLRACE_{name.upper()}", raising=False)


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().port == 8000
    monkeypatch.setenv("MILLRACE_PORT", "9000")
    assert Settings.load().port == 9000
    assert Settings.load(port=7000).port == 7000


def test_the_environment_is_read_with_its_types(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"MODEL": "some/folder", "LOG_JSON": "1", "CACHE_GIB": "0.5", "MODEL_NAME": ""}.items():
        monkeypatch.setenv(f"MILLRACE_{name}", text)
    settings = Settings.load()
    assert (settings.model, settings.log_json, settings.cache_gib) == (Path("some/folder"), True, 0.5)
    assert settings.model_name is None


def test_an_unknown_name_refuses_and_says_the_likely_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_PROT", "9000")
    with pytest.raises(SettingsError, match=r"MILLRACE_PROT.*did you mean MILLRACE_PORT"):
        Settings.load()


@pytest.mark.parametrize(
    ("name", "bad"), [("port", "x"), ("port", "70000"), ("device", "tpu"), ("drain_s", "nan"), ("quantize", "int3")]
)
def test_a_bad_value_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, bad: str) -> None:
    monkeypatch.setenv(f"MILLRACE_{name.upper()}", bad)
    with pytest.raises(
        SettingsError, match=f"--{name.replace('_', '-')} or MILLRACE_{name.upper()}: got '{bad}'"
    ) as told:
        Settings.load()
    assert "\n" not in str(told.value)


def test_settings_are_frozen_and_unknown_flags_refuse() -> None:
    with pytest.raises(ValidationError):
        Settings.load().port = 1
    with pytest.raises(SettingsError, match="--prot"):
        Settings.load(prot=1)


# --- the password ----------------------------------------------------------------------------------------------------


def test_the_password_of_the_queue_is_not_in_what_settings_show() -> None:
    settings = Settings.load(redis_url=URL)
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == URL
    assert not any("s3cret" in shown for shown in (repr(settings), str(settings), settings.model_dump_json()))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "redis://queue.example:6380/2"),
        ("rediss://:s3cret@10.0.0.1", "rediss://10.0.0.1"),
        ("redis://:s3cret@[::1]:6379?client_name=a", "redis://[::1]:6379"),
        ("unix://:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert Settings.load(redis_url=url).redis_url
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@localhost",
        "redis://:s3cret@localhost:port",
        "redis://:s3cret@localhost:99999",
        "redis://:half/s3cret@localhost",
        "redis://:s3cret@",
        "redis://[s3cret",
        "redis://localhost?password=s3cret",
        "unix:///run/redis.sock?pass%77ord=s3cret",
        "s3cret",
        "unix://",
    ],
)
def test_a_url_that_can_not_be_used_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("MILLRACE_REDIS_URL", url)
    with pytest.raises(SettingsError, match=r"--redis-url or MILLRACE_REDIS_URL: .*redis://") as told:
        Settings.load()
    assert "s3cret" not in str(told.value)
    assert told.value.__suppress_context__


def test_a_child_process_has_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_PORT", "9000")
    monkeypatch.setenv("MILLRACE_LOG_LEVEL", "debug")
    settings = Settings.load(redis_url=URL, model=Path("some/folder"), log_json=True, cache_gib=0.1, port=9001)
    told = settings.environment()
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MILLRACE_{name.upper()}", raising=False)
    for name, text in told.items():
        monkeypatch.setenv(name, text)
    assert Settings.load() == settings
    assert "PATH" in told
