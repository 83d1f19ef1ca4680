"""What tests of long runs take from the engine's tests."""

from __future__ import annotations

from tests.engine.conftest import tiny

__all__ = ["tiny"]
