"""The key of an audit trail: without it, nobody can change a record so that the chain still holds."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from monitor.audit.errors import AuditError

KEY_VARIABLE = "TELLTALE_AUDIT_KEY"
_BYTES = 32
_FORM = re.compile(rf"^[0-9a-f]{{{2 * _BYTES}}}$")


@dataclass(frozen=True, slots=True)
class AuditKey:
    """An HMAC-SHA256 key.

    Attributes:
        secret: 32 bytes.
    """

    secret: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """16 hexadecimal digits that stand on every record; they tell nothing of the key."""
        return self.mac("key-id")[:16]

    def mac(self, purpose: str, *parts: str | int) -> str:
        """The MAC over parts, as 64 hexadecimal digits. Parts and purposes cannot run into each other."""
        message = json.dumps(["telltale-audit-1", purpose, *parts], separators=(",", ":")).encode()
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()


def read_key(path: Path) -> AuditKey:
    """A key from its file.

    Raises:
        AuditError: it is missing, others may read it, or it holds no key.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(
            f"audit key {path}: cannot be read ({error}). Give its path with 'key_file' or --key-file, or set "
            f"{KEY_VARIABLE}."
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise AuditError(
            f"audit key {path}: others than its owner may use it (mode {stat.S_IMODE(mode):04o}); 0600 is needed. "
            f"Run: chmod 600 {path}"
        )
    return _parse(text, f"audit key {path}")


def load_key(path: Path, *, make: bool, environment: Mapping[str, str] = os.environ) -> AuditKey:
    """The key from the environment if it is there, else from its file.

    Args:
        path: of the file.
        make: make a missing file, readable by its owner only. Of several processes that do so at once, one wins.
        environment: of the process.
    Raises:
        AuditError: there is no usable key.
    """
    if (text := environment.get(KEY_VARIABLE)) is not None:
        return _parse(text, KEY_VARIABLE)
    if make and not path.exists():
        _make(path)
    return read_key(path)


def _make(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # whole or not at all, and never over another's key
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    except OSError as error:
        raise AuditError(
            f"audit key {path}: cannot be made ({error.strerror}). Make the folder writable, set 'key_file' to another "
            f"place, or set {KEY_VARIABLE} to 64 hexadecimal digits."
        ) from error


def _parse(text: str, where: str) -> AuditKey:
    text = text.strip()
    if not _FORM.fullmatch(text):
        raise AuditError(
            f"{where}: holds no key; 64 lower-case hexadecimal digits are one. Make one: openssl rand -hex 32"
        )
    return AuditKey(bytes.fromhex(text))
