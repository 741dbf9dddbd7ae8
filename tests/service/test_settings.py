"""Flags over environment over defaults; anything unknown or bad refuses."""

from pathlib import Path
from urllib.parse import quote

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


# --- a password and a certificate from files -------------------------------------------------------------------------


def test_the_password_comes_from_a_file_and_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a/b@c:%\n")
    settings = Settings.load(redis_url="redis://api@queue:6379/0", redis_password_file=tmp_path / "password")
    assert settings.queue_url == "redis://api:a%2Fb%40c%3A%25@queue:6379/0"
    assert "a/b" not in repr(settings) and "a%2Fb" not in repr(settings.environment())
    nameless = Settings.load(redis_url="rediss://[::1]:6380", redis_password_file=tmp_path / "password")
    assert nameless.queue_url == "rediss://:a%2Fb%40c%3A%25@[::1]:6380"


def test_the_certificate_goes_to_the_client_and_is_not_shown(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    url = Settings.load(redis_url="rediss://api:s3cret@queue", redis_ca_file=ca).queue_url
    assert url == f"rediss://api:s3cret@queue?ssl_ca_certs={quote(str(ca), safe='')}"
    assert shown_url(url) == "rediss://queue"
    with pytest.raises(SettingsError, match="only a rediss:// URL uses it"):
        _ = Settings.load(redis_url="redis://queue", redis_ca_file=ca).queue_url


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_password_file_without_a_password_refuses(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"--redis-password-file: .*(is empty|can't be read)"):
        _ = Settings.load(redis_url="redis://queue", redis_password_file=file).queue_url


def test_a_password_has_one_place(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("x")
    settings = Settings.load(redis_url=URL, redis_password_file=tmp_path / "password")
    with pytest.raises(SettingsError, match="has a password too") as told:
        _ = settings.queue_url
    assert "s3cret" not in str(told.value)
