"""The key file: what goes in, who is found in it, and what refuses to start."""

import hashlib
import hmac
import json
import stat
from pathlib import Path

import pytest

from service.cli import main
from service.errors import StartupError
from service.keys import Keyring, add_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_told_once_and_kept_hashed(file: Path) -> None:
    key = add_key(file, "ada", weight=2.0, max_concurrent=3)
    text = file.read_text()
    assert key not in text and hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    tenant = Keyring(file).tenant(key.encode())
    assert tenant is not None
    assert (tenant.name, tenant.weight, tenant.max_concurrent, tenant.tokens_per_minute) == ("ada", 2.0, 3, None)


def test_a_second_key_of_a_tenant_leaves_the_first_and_its_limits(file: Path) -> None:
    first, second = add_key(file, "ada", requests_per_minute=9), add_key(file, "ada", weight=3.0)
    other = add_key(file, "bob")
    ring = Keyring(file)
    of_first, of_second = ring.tenant(first.encode()), ring.tenant(second.encode())
    assert of_first == of_second and of_first is not None
    assert (of_first.requests_per_minute, of_first.weight) == (9, 3.0)
    bob = ring.tenant(other.encode())
    assert bob is not None and bob.name == "bob"
    assert ring.weights == {"ada": 3.0, "bob": 1.0}


@pytest.mark.parametrize("wrong", [" ", "mr-", "x" * 10_000, "é"])
def test_what_is_no_key_is_nobodys(file: Path, wrong: str) -> None:
    key = add_key(file, "ada")
    ring = Keyring(file)
    for given in ("", wrong, wrong + key, key + wrong, key[:-1], key.upper()):
        assert ring.tenant(given.encode()) is None


def test_every_key_is_compared_whichever_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [add_key(file, name) for name in ("ada", "bob", "eve")]
    ring, num_compared, compare = Keyring(file), 0, hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        nonlocal num_compared
        num_compared += 1
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for num_asked, key in enumerate((*held, "mr-none"), 1):
        ring.tenant(key.encode())
        assert num_compared == 3 * num_asked


def test_a_file_that_has_changed_is_gone_by_and_a_broken_one_is_not(file: Path) -> None:
    key = add_key(file, "ada")
    ring = Keyring(file)
    weights = ring.weights
    new = add_key(file, "bob", weight=5.0)
    assert ring.tenant(new.encode()) is None
    assert ring.reload() == 2
    assert ring.tenant(new.encode()) is not None and weights == {"ada": 1.0, "bob": 5.0}
    file.write_text("{")
    with pytest.raises(StartupError):
        ring.reload()
    assert ring.tenant(key.encode()) is not None and weights == {"ada": 1.0, "bob": 5.0}


GOOD = {"name": "ada", "keys": ["0" * 64]}


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (None, "can't be read"),
        ({"tenants": []}, "holds no keys"),
        ({}, "tenants: Field required"),
        ({"tenants": [GOOD | {"keys": ["secret"]}]}, "keys.0"),
        ({"tenants": [GOOD | {"weight": 0}]}, "weight"),
        ({"tenants": [GOOD | {"max_concurrent": True}]}, "max_concurrent"),
        ({"tenants": [GOOD | {"burst": 3}]}, "burst"),
        ({"tenants": [GOOD | {"name": "a b"}]}, "name"),
        ({"tenants": [GOOD, GOOD]}, "there twice"),
        ({"tenants": [GOOD, GOOD | {"name": "bob"}]}, "there twice"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused_in_one_line(file: Path, held: object, told: str) -> None:
    if held is not None:
        file.write_text(json.dumps(held))
    with pytest.raises(StartupError, match=told) as refusal:
        Keyring(file)
    assert "\n" not in str(refusal.value) and "secret" not in str(refusal.value)


def test_the_command_prints_the_key_and_nothing_else(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "add", "ada", "--file", str(file), "--weight", "2", "--tokens-per-minute", "1000"])
    told = capsys.readouterr()
    tenant = Keyring(file).tenant(told.out.strip().encode())
    assert tenant is not None and (tenant.weight, tenant.tokens_per_minute) == (2.0, 1000)
    assert told.out.count("\n") == 1 and "only now" in told.err


@pytest.mark.parametrize("flags", [["--weight", "0"], ["--max-concurrent", "-1"]])
def test_the_command_refuses_what_the_file_would_not_take(
    file: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["keys", "add", "ada", "--file", str(file), *flags])
    assert end.value.code == 3 and not file.exists()
    assert capsys.readouterr().err.startswith("millrace: ")
