"""The administrator's key of servers whose policy file has none: made once, shown once, kept as a digest."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from probes.errors import TelltaleError
from serving.api.keyring import digest_of, new_key

FILE = "admin-key.sha256"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODE = 0o600


class AdminKeyError(TelltaleError, OSError):
    """The digest of the administrator's key cannot be read or kept."""


def ensure_admin_key(folder: Path) -> str | None:
    """Make a key unless there is one.

    Args:
        folder: of the user's state; made if missing.
    Returns: the new key, which nobody can find out again; None if there was one.
    Raises:
        AdminKeyError: the folder cannot be written, or what lies there is not to be trusted.
    """
    path, key = folder / FILE, new_key()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Of several servers that start at once, one makes it.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE), "w") as file:
            file.write(f"{digest_of(key)}\n")
    except FileExistsError:
        read_admin_digest(folder)
        return None
    except OSError as error:
        raise AdminKeyError(
            f"{path}: cannot be written ({error.strerror}). Set TELLTALE_STATE to a folder of your own, or write a key "
            "with the scope admin under 'access' in the policy file (telltale key new --scope admin)."
        ) from error
    return key


def read_admin_digest(folder: Path) -> str | None:
    """The digest that ``ensure_admin_key`` has kept; None if there is none.

    Raises:
        AdminKeyError: others could have written it, or it is no digest.
    """
    path = folder / FILE
    try:
        found = path.stat()
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AdminKeyError(
            f"{path}: cannot be read ({error}). Remove it: a new key is made at the next start."
        ) from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid != os.getuid():
        raise AdminKeyError(
            f"{path}: others than you may use it (mode {mode:04o}, owner {found.st_uid}); 0600 and your own is needed. "
            "Remove it: a new key is made at the next start."
        )
    if not _DIGEST.fullmatch(text):
        raise AdminKeyError(f"{path}: holds no SHA-256 digest. Remove it: a new key is made at the next start.")
    return text
