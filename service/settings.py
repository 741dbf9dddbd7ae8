"""Every setting of the program, read once and frozen: the only reader of the environment.

A setting comes from its command-line flag, else from `MILLRACE_<NAME>`, else from the default here. Unknown names and
bad values refuse to start. It knows nothing of what the settings are used for. What is secret is never told: not in a
refusal, not by `repr`.
"""

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "MILLRACE_"
BUNDLED = Path(__file__).parent.parent / "model" / "bundled"


class SettingsError(ValueError):
    """A setting that can't be used, in one line: its name, what it held and what is allowed."""


def shown_url(url: str) -> str:
    """A URL without user, password and options, for people to read."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _redis_url(secret: SecretStr) -> SecretStr:
    """A path that is no number is refused for what it may be: the rest of a password with an unescaped slash. And a
    password has one place, since who shows a URL must know where to leave it out."""
    with suppress(ValueError):  # an address or a port that is none
        parts = urlsplit(secret.get_secret_value())
        if {"username", "password"} & set(parse_qs(parts.query)):
            raise ValueError
        if parts.scheme == "unix" and parts.path:
            return secret
        complete = parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0
        if complete and re.fullmatch(r"/?\d*", parts.path):
            return secret
    raise ValueError(
        "expected redis://[user:password@]host[:port][/number], rediss:// for TLS, or unix:///path/of/socket; "
        "special characters of a password are written as %XX"
    )


def _password(file: Path) -> str:
    """What a file holds, but for the newline at its end. Raises `SettingsError`, which does not show it."""
    try:
        secret = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--redis-password-file: {file} can't be read: {error}") from None
    if not secret:
        raise SettingsError(f"--redis-password-file: {file} is empty")
    return secret


def _split(value: object) -> object:
    """Several values in one text, commas between."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Host = Annotated[str, Field(pattern=r"^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$")]
Origin = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[A-Za-z0-9._:\[\]-]+$")]


class Settings(BaseSettings):
    """What an operator can choose. Durations are seconds; None lets the program decide."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_keys_file: Path | None = Field(None, description="who may ask; without it nobody but this machine is served")
    insecure_no_auth: bool = Field(False, description="listen beyond this machine without keys")
    allowed_hosts: Annotated[tuple[Host, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="Host headers that are answered; on loopback its names if absent, elsewhere any"
    )
    cors_origin: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="pages elsewhere that may ask, such as https://chat.example; never all"
    )
    max_connections: int = Field(1100, ge=1, le=100_000, description="connections at a time, idle ones included")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="a port of its own for /metrics")
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address of that port")
    model: Path | None = Field(None, description="model folder; the bundled model if absent")
    model_name: str | None = Field(None, min_length=1, max_length=200, description="name it is served under")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format of the weights")
    quantize: Literal["none", "int8"] | None = Field(None, description="weights of one byte; absent: as they are")
    deterministic: bool = Field(False, description="the same text in any batch also in 16 bits and on a GPU; slower")
    max_model_len: int | None = Field(None, ge=2, description="tokens of prompt and output together")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences computed in one step")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads that compute; one less than the cores")
    cache_gib: float | None = Field(None, gt=0, description="memory for the key-value cache, GiB")
    attention_view: bool = Field(False, description="let the chat page show where each head looked")
    native: bool = Field(True, description="on a CPU, compute a step in one call of the native core")
    prefix_cache: bool = Field(True, description="compute a common beginning of prompts once")
    max_waiting: int = Field(256, ge=1, description="requests that may wait before new ones are refused")
    max_waiting_tokens: int = Field(1_000_000, ge=1, description="prompt tokens that may wait")
    drain_s: float = Field(25.0, ge=0, le=3600, description="how long running requests may finish after SIGTERM")
    keep_s: float = Field(120.0, ge=0, le=86400, description="how long an ended request's log is kept")
    orphan_s: float = Field(30.0, gt=0, le=86400, description="how long a resumable request runs with no reader")
    max_request_s: float = Field(3600.0, gt=0, le=86400, description="longest life of a request, whatever it asks for")
    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = Field(
        None, description="where API processes and workers meet; without it one process does everything"
    )
    redis_password_file: Path | None = Field(None, description="a file with the password, where the URL has none")
    redis_ca_file: Path | None = Field(None, description="who certifies a Redis reached by rediss://, as PEM")
    lease_s: float = Field(3.0, ge=0.5, le=60, description="how long a silent worker keeps its requests")
    stuck_s: float = Field(30.0, ge=1, le=3600, description="an engine without a step for so long is given up")
    otlp_endpoint: str | None = Field(
        None, pattern=r"^https?://[^\s]+$", description="where to send traces, such as http://127.0.0.1:4318"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")
    log_json: bool = Field(False, description="log one JSON object a line")

    @classmethod
    def load(cls, **flags: object) -> "Settings":
        """The settings, with the given flags over the environment. Raises `SettingsError`."""
        _refuse_unknown_names()
        try:
            return cls(**flags)  # type: ignore[arg-type]  # pydantic checks them
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            where = f"--{name.replace('_', '-')} or {PREFIX}{name.upper()}"
            got = "" if name == "redis_url" else f" got {first['input']!r}:"
            raise SettingsError(f"{where}:{got} {first['msg']}") from None

    @property
    def queue_url(self) -> str | None:
        """The URL of Redis with the password from its file and the CA to trust: what a client is given. Raises
        `SettingsError`."""
        if self.redis_url is None:
            return None
        url = self.redis_url.get_secret_value()
        parts = urlsplit(url)
        if self.redis_password_file is not None:
            if parts.scheme == "unix" or parts.password is not None:
                raise SettingsError("--redis-password-file: the URL of Redis has a password too, or is a unix socket")
            secret = quote(_password(self.redis_password_file), safe="")
            host = parts.netloc.rpartition("@")[2]
            parts = parts._replace(netloc=f"{parts.username or ''}:{secret}@{host}")
        if self.redis_ca_file is not None:
            if parts.scheme != "rediss":
                raise SettingsError("--redis-ca-file: only a rediss:// URL uses it; without it nothing is encrypted")
            if not self.redis_ca_file.is_file():
                raise SettingsError(f"--redis-ca-file: there is no file {self.redis_ca_file}")
            parts = parts._replace(query=urlencode({"ssl_ca_certs": self.redis_ca_file}))
        return parts.geturl()

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or (self.model or BUNDLED).resolve().name

    def environment(self) -> dict[str, str]:
        """The environment in which a child process has these settings: a command line would show a password."""
        shared = {name: text for name, text in os.environ.items() if not name.upper().startswith(PREFIX)}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is not None:
                text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
                shared[PREFIX + name.upper()] = ",".join(value) if isinstance(value, tuple) else text
        return shared


def _refuse_unknown_names() -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known names: {', '.join(known)}"
            raise SettingsError(f"unknown setting {name} in the environment; {hint}")
