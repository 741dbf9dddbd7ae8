"""`rediss://` against a real redis-server with a certificate of its own authority: who trusts it gets in."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.broker.redis import Link, check
from service.cli import main
from service.errors import StartupError
from service.settings import Settings
from tests.faults.redis_server import START_S, free_port
from tests.service.helpers_redis import need_redis

PASSWORD = "s3cr/et@"
OPENSSL = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]


def authority(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [*OPENSSL, "-subj", f"/CN={name}", "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    return certificate, key


def certified(folder: Path, ca: tuple[Path, Path]) -> tuple[Path, Path]:
    """A certificate for `localhost` by that authority, and its key."""
    request, key, certificate = folder / "server.csr", folder / "server.key", folder / "server.crt"
    new = ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=queue"]
    subprocess.run([*new, "-keyout", key, "-out", request], check=True, capture_output=True)
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    sign: list[str | Path] = [
        "openssl",
        "x509",
        "-req",
        "-in",
        request,
        "-CA",
        ca[0],
        "-CAkey",
        ca[1],
        "-CAcreateserial",
        "-days",
        "2",
    ]
    subprocess.run([*sign, "-extfile", folder / "names", "-out", certificate], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ca.crt, other.crt, and the password in a file."""
    found = tmp_path_factory.mktemp("tls")
    (found / "password").write_text(PASSWORD + "\n")
    return found


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Of a server that speaks TLS only."""
    need_redis()
    ca = authority(folder, "ca")
    authority(folder, "other")
    certificate, key = certified(folder, ca)
    port = free_port()
    command = ["redis-server", "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    command += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(ca[0])]
    command += ["--tls-auth-clients", "no", "--save", "", "--requirepass", PASSWORD, "--logfile", "redis.log"]
    process = subprocess.Popen(command)
    until_s = time.monotonic() + START_S
    try:
        while "Ready to accept" not in log(folder):
            assert process.poll() is None and time.monotonic() < until_s, log(folder)[-2000:]
            time.sleep(0.01)
        yield port
    finally:
        process.kill()
        process.wait()


def log(folder: Path) -> str:
    file = folder / "redis.log"
    return file.read_text() if file.exists() else ""


def url(folder: Path, port: int, ca: str | None = "ca", host: str = "localhost", scheme: str = "rediss") -> str:
    """As the settings make it of a URL without a secret, and two files."""
    settings = Settings.load(
        redis_url=f"{scheme}://{host}:{port}/0",
        redis_password_file=folder / "password",
        redis_ca_file=folder / f"{ca}.crt" if ca else None,
    )
    assert settings.queue_url is not None
    return settings.queue_url


async def test_who_trusts_its_authority_gets_in(folder: Path, port: int) -> None:
    link = Link(url(folder, port), may_load=True)
    await link.open()
    await link.call("reap", within_s=START_S)
    await link.close()


def test_the_functions_are_loaded_through_it(folder: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--redis-password-file", str(folder / "password"), "--redis-ca-file", str(folder / "ca.crt")]
    main(["load-functions", "--redis-url", f"rediss://localhost:{port}", *files])
    assert capsys.readouterr().out == f"loaded into rediss://localhost:{port}\n"


@pytest.mark.parametrize(("ca", "host"), [(None, "localhost"), ("other", "localhost"), ("ca", "127.0.0.1")])
def test_another_authority_or_name_is_not_trusted(folder: Path, port: int, ca: str | None, host: str) -> None:
    with pytest.raises(StartupError, match=r"a certificate that is not trusted; .*--redis-ca-file") as told:
        check(url(folder, port, ca, host))
    assert "\n" not in str(told.value)
    assert str(folder) not in str(told.value) and "s3cr" not in str(told.value)


def test_without_tls_it_does_not_answer(folder: Path, port: int) -> None:
    with pytest.raises(StartupError, match="can't be reached at localhost"):
        check(url(folder, port, ca=None, scheme="redis"))
