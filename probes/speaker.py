"""Who speaks in a conversation. Loads nothing, so that commands can name it."""

from __future__ import annotations

from enum import StrEnum


class Speaker(StrEnum):
    """Whose text a message of a conversation is."""

    SYSTEM = "system"
    USER = "user"
    TOOL = "tool"
    """What a tool answered: text that neither the user nor the operator wrote."""
