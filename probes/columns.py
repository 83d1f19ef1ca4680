"""Columns of an engine that runs: which directions stand where, and where new ones go. Knows no detector's kind."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from probes.detectors.base import Directions
from probes.errors import TelltaleError
from probes.taps import Tap

Residents = Mapping[Tap, Mapping[int, str]]
"""By tap and column, counted from the tap's first, the digest of the direction that stands there."""


class NoRoomError(TelltaleError, ValueError):
    """Directions do not fit into what an engine has set aside when it started.

    Args:
        setting: of the policy file that says what was set aside.
        message: what is missing.
    """

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def direction_digest(tap: Tap, weight: npt.NDArray[np.float32], bias: np.float32) -> str:
    """SHA-256 of a direction: the same for a copy that is read back from a device, whatever column it stands in.

    Args:
        tap: where it is read.
        weight: (d_model,) float32.
        bias: float32.
    """
    content = np.ascontiguousarray(weight, dtype=np.float32).tobytes() + np.float32(bias).tobytes()
    return hashlib.sha256(f"{tap};".encode() + content).hexdigest()


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine that runs has room for.

    Attributes:
        taps: that are in place, in the order of a row of readouts.
        taken: columns that requests which run may still read. A direction that stands there already is used as it
            is; nothing else is ever written to such a column.
    """

    taps: tuple[Tap, ...]
    taken: Residents = field(default_factory=dict)

    def places(self, tap: Tap, capacity: int) -> Places:
        """Where directions go at one tap.

        Args:
            tap: where they are read.
            capacity: columns of each tap.
        Raises:
            NoRoomError: the engine has no such tap.
        """
        if tap not in self.taps:
            raise NoRoomError(
                "detectors",
                f"{tap} is to be read, and the server was started with {', '.join(map(str, self.taps))}. Taps are put "
                "in place before the model is compiled.",
            )
        return Places(tap, capacity, self.taken.get(tap, {}))

    def as_json(self) -> dict[str, object]:
        """In plain data, for another process."""
        taken = {str(tap): {str(column): digest for column, digest in at.items()} for tap, at in self.taken.items()}
        return {"taps": [str(tap) for tap in self.taps], "taken": taken}

    @classmethod
    def of_json(cls, data: Mapping[str, object]) -> Room:
        """Undo ``as_json``.

        Raises:
            TypeError: it was not made by ``as_json``.
        """
        taps, taken = data["taps"], data["taken"]
        if not isinstance(taps, list | tuple) or not isinstance(taken, Mapping):
            raise TypeError("a room is {taps: [...], taken: {...}}")
        found = {
            Tap.parse(tap): {int(column): str(digest) for column, digest in at.items()} for tap, at in taken.items()
        }
        return cls(tuple(Tap.parse(tap) for tap in taps), found)


class Places:
    """Hands out the columns of one tap: the same ones in every process that asks in the same order.

    Args:
        tap: whose.
        capacity: how many there are.
        taken: those that are not free, with what stands there.
    """

    def __init__(self, tap: Tap, capacity: int, taken: Mapping[int, str]) -> None:
        self._tap = tap
        self._capacity = capacity
        self._held = len(taken)
        self._known = {digest: column for column, digest in taken.items()}
        self._free = [column for column in range(capacity - 1, -1, -1) if column not in taken]

    def take(self, directions: Directions) -> npt.NDArray[np.intp]:
        """Columns for some directions: (k,), counted from the tap's first. Equal directions share a column.

        Raises:
            NoRoomError: there are not enough free ones.
        """
        weight, bias = directions.weight.astype(np.float32), directions.bias.astype(np.float32)
        columns = []
        for number in range(weight.shape[1]):
            digest = direction_digest(self._tap, weight[:, number], bias[number])
            if digest not in self._known:
                if not self._free:
                    raise NoRoomError(
                        "reserve.directions",
                        f"{self._tap}: no free column is left of the {self._capacity} that are reserved; {self._held} "
                        "hold directions of policies that requests run under. They are freed when the last of those "
                        "requests has ended, so that a policy can also be changed in two steps: first without the "
                        "old detectors, then with the new ones.",
                    )
                self._known[digest] = self._free.pop()
            columns.append(self._known[digest])
        return np.array(columns, dtype=np.intp)


def union(*parts: Residents) -> Residents:
    """All columns that one of these holds."""
    joined: dict[Tap, dict[int, str]] = {}
    for part in parts:
        for tap, columns in part.items():
            joined.setdefault(tap, {}).update(columns)
    return joined
