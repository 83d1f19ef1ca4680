"""Where Telltale keeps what it can make again: one folder per user; knows nothing of what is in it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache_dir"]


def user_cache_dir() -> Path:
    """``TELLTALE_CACHE``, else ``telltale`` in ``XDG_CACHE_HOME``, else ``~/.cache/telltale``; need not exist yet."""
    if own := os.environ.get("TELLTALE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "telltale"
    return Path.home() / ".cache" / "telltale"
