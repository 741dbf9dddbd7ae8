"""Flags over environment over defaults; anything unknown or bad refuses."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, SettingsError


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


@pytest.mark.parametrize(("name", "bad"), [("port", "x"), ("port", "70000"), ("device", "tpu"), ("drain_s", "nan")])
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
