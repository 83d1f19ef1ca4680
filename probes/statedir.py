"""Where Telltale keeps what it cannot make again: one folder per user; knows nothing of what is in it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_state_dir"]


def user_state_dir() -> Path:
    """``TELLTALE_STATE``, else ``telltale`` in ``XDG_STATE_HOME``, else ``~/.local/state/telltale``; may not exist."""
    if own := os.environ.get("TELLTALE_STATE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_STATE_HOME"):
        return Path(shared).expanduser() / "telltale"
    return Path.home() / ".local" / "state" / "telltale"
