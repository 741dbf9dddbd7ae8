"""The key file: which keys there are, whose, and what each tenant may do. It knows neither HTTP nor queue.

A JSON object: `{"tenants": [...]}`, each with what `Tenant` has. Of a key only its SHA-256 is kept: it holds 256 random
bits, so there is nothing to guess and nothing to salt.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import StartupError

PREFIX = "mr-"  # so that a key that got somewhere it should not be is known for what it is
KEY_BYTES = 32
MOST = 10**9  # of any limit
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Tenant(BaseModel):
    """Somebody who has keys. `weight` is the share in the queue; a limit that is None is none."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=NAME)
    keys: tuple[Digest, ...] = Field(min_length=1, max_length=16)
    weight: float = Field(1.0, ge=0.01, le=1000)
    max_concurrent: int | None = Field(None, ge=1, le=MOST)
    requests_per_minute: int | None = Field(None, ge=1, le=MOST)
    tokens_per_minute: int | None = Field(None, ge=1, le=MOST)


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tenants: tuple[Tenant, ...]


class Keyring:
    """The keys of a file, read again when told. `weights` is one mapping for good, whose contents follow the file."""

    def __init__(self, path: Path) -> None:
        """Raises `StartupError`."""
        self._path = path
        self._stored: tuple[tuple[bytes, Tenant], ...] = ()
        self.weights: dict[str, float] = {}
        self.reload()

    def reload(self) -> int:
        """Go by what the file says now; returns how many tenants there are. Raises `StartupError`, and then nothing
        has changed."""
        tenants = _read(self._path)
        if not tenants:
            raise StartupError(f"{self._path} holds no keys; make one with: millrace keys add NAME --file {self._path}")
        self._stored = tuple((bytes.fromhex(digest), tenant) for tenant in tenants for digest in tenant.keys)
        for name in set(self.weights) - {tenant.name for tenant in tenants}:
            del self.weights[name]
        self.weights.update({tenant.name: tenant.weight for tenant in tenants})
        return len(tenants)

    def tenant(self, key: bytes) -> Tenant | None:
        """Whose key it is. All are compared, whichever fits, so that the time taken tells nothing."""
        digest, found = hashlib.sha256(key).digest(), None
        for stored, tenant in self._stored:
            if hmac.compare_digest(digest, stored):
                found = tenant
        return found


def add_key(path: Path, name: str, **settings: float | None) -> str:
    """Put a new key of `name` into the file, made if absent, and return it: nobody can read it there. A tenant that is
    there already gets one more key, and the settings that are given. Raises `StartupError`."""
    tenants = {tenant.name: tenant for tenant in (_read(path) if path.exists() else ())}
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    digest = hashlib.sha256(key.encode()).hexdigest()
    before = tenants[name].model_dump() if name in tenants else {"name": name, "keys": ()}
    given = {field: value for field, value in settings.items() if value is not None}
    try:
        tenants[name] = Tenant.model_validate(before | given | {"keys": (*before["keys"], digest)})
    except ValidationError as error:
        raise StartupError(_first(error)) from None
    _write(path, _File(tenants=tuple(tenants.values())))
    return key


def _read(path: Path) -> tuple[Tenant, ...]:
    try:
        tenants = _File.model_validate_json(path.read_bytes()).tenants
    except OSError as error:
        fix = f"make one with: millrace keys add NAME --file {path}"
        raise StartupError(f"the key file {path} can't be read: {error.strerror}; {fix}") from None
    except ValidationError as error:
        raise StartupError(f"the key file {path}: {_first(error)}") from None
    digests = [digest for tenant in tenants for digest in tenant.keys]
    if len({tenant.name for tenant in tenants}) < len(tenants) or len(set(digests)) < len(digests):
        raise StartupError(f"the key file {path}: a name or a key is there twice; every tenant and key goes in once")
    return tenants


def _write(path: Path, file: _File) -> None:
    """All of it or nothing, readable by the owner only, unless the file was there and others may read it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
            os.fchmod(out.fileno(), mode)
            out.write(file.model_dump_json(indent=1, exclude_none=True) + "\n")
        beside.replace(path)
    except OSError as error:
        raise StartupError(f"the key file {path} can't be written: {error.strerror}") from None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    told = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in told['loc']) or 'it'}: {told['msg']}"
