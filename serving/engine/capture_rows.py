"""The rows that a capturing engine's workers send, put where they belong in a shard. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from probes.bank import Bank
from probes.errors import TelltaleError
from probes.fit.reading.activation_writer import ShardBuffer
from serving.engine.readouts import WorkerReadouts

_SINK_POSITIONS: Final = 4
_SINK_FACTOR: Final = 10.0
_SINK_REQUESTS: Final = 64
"""A position counts as a sink whose median norm is ten times that of all positions behind the fourth."""
_REPORT = "Nothing of this shard was written. Run the same command again; if it happens again, report it."

Float32 = npt.NDArray[np.float32]


class CaptureError(TelltaleError, RuntimeError):
    """The engine did not send every row of a request: nothing of its shard is written."""


class CaptureRows:
    """Joins rows and requests by position: each position of each request counts once.

    A prompt may come in chunks, in any order among requests, and again from its beginning after a preemption. What must
    not happen is a position that never came.

    Args:
        shard: to fill.
        bank: of the capture.
    """

    def __init__(self, shard: ShardBuffer, bank: Bank) -> None:
        self._requests = shard.requests
        self._starts = shard.offsets
        width = bank.d_model
        begins = [bank.norm_column(tap) - width for tap in bank.taps]
        self._columns = [
            (slice(begin, begin + width), shard.activations[str(tap)])
            for begin, tap in zip(begins, bank.taps, strict=True)
        ]
        self._norm_columns = np.array([begin + width for begin in begins])
        self._names: dict[str, int] = {}
        self._seen = np.zeros(len(shard.requests), dtype=np.int64)
        # The norms of a few requests; the others add nothing to a median.
        watched = [n for n, request in enumerate(shard.requests) if len(request.tokens) > _SINK_POSITIONS]
        self._norms: dict[int, Float32] = {
            number: np.empty((len(shard.requests[number].tokens), len(begins)), dtype=np.float32)
            for number in watched[:_SINK_REQUESTS]
        }

    @property
    def tokens_seen(self) -> int:
        """Tokens of the shard whose rows are here."""
        return int(self._seen.sum())

    def expect(self, name: str, number: int) -> None:
        """Say what the engine calls a request.

        Args:
            name: that its rows will carry.
            number: in the shard, from 0.
        """
        self._names[name] = number

    def take(self, scheduled: Mapping[str, int], readouts: WorkerReadouts | None) -> None:
        """Take in the rows of one step.

        Args:
            scheduled: rows that each request of the step should have, by its name.
            readouts: of the step; None where the workers sent none.
        Raises:
            CaptureError: rows are missing, of nobody, not finite, or leave positions out.
        """
        if not scheduled:
            return
        if readouts is None:
            raise CaptureError(f"a step of {len(scheduled)} requests came back without readouts. {_REPORT}")
        counts = dict(zip(readouts.request_ids, readouts.counts.tolist(), strict=True))
        if counts != dict(scheduled):
            raise CaptureError(
                f"a step of {sum(scheduled.values())} rows for {len(scheduled)} requests came back with "
                f"{sum(counts.values())} rows for {len(counts)}. {_REPORT}"
            )
        squares = readouts.readouts[:, self._norm_columns]
        start = 0
        for name, count in counts.items():
            self._take_request(name, readouts, squares, slice(start, start + count))
            start += count

    def finish(self) -> int:
        """Say that no more rows will come.

        Returns: how many leading positions are sinks, at any of the taps.
        Raises:
            CaptureError: a position of a request never came.
        """
        for number, request in enumerate(self._requests):
            if self._seen[number] < len(request.tokens):
                raise CaptureError(
                    f"line {request.record.line}: {int(self._seen[number])} of its {len(request.tokens)} tokens were "
                    f"computed in front of the taps. {_REPORT}"
                )
        return _leading_sinks(list(self._norms.values()))

    def _take_request(self, name: str, readouts: WorkerReadouts, squares: Float32, rows: slice) -> None:
        number = self._names.get(name)
        if number is None:
            raise CaptureError(f"rows came of a request that nobody sent ({name}). {_REPORT}")
        request = self._requests[number]
        positions = readouts.positions[rows]
        first, stop = int(positions[0]), int(positions[-1]) + 1
        seen = int(self._seen[number])
        if stop - first != len(positions) or np.any(np.diff(positions) != 1) or first > seen:
            raise CaptureError(
                f"line {request.record.line}: rows of the positions {first} to {stop - 1} came while {seen} was next. "
                f"{_REPORT}"
            )
        if not np.isfinite(squares[rows]).all():
            raise CaptureError(
                f"line {request.record.line}: a tap did not run, or its activation is not finite, between the "
                f"positions {first} and {stop - 1}. {_REPORT}"
            )
        # What came before (a preempted request is computed again) and what lies behind the prompt is not needed.
        fresh = range(max(first, seen), min(stop, len(request.tokens)))
        if not fresh:
            return
        self._seen[number] = fresh.stop
        offset = rows.start - first
        if number in self._norms:
            self._norms[number][fresh.start : fresh.stop] = squares[fresh.start + offset : fresh.stop + offset]
        begin, end = max(fresh.start, request.first), min(fresh.stop, request.stop)
        if begin < end:
            target = int(self._starts[number]) - request.first
            for columns, activations in self._columns:
                activations[begin + target : end + target] = readouts.readouts[begin + offset : end + offset, columns]


def _leading_sinks(squared_norms: Sequence[Float32]) -> int:
    """How many leading positions have a norm far above the rest, at any tap.

    Args:
        squared_norms: of some requests, (tokens, taps) each, with more than four tokens.
    """
    if not squared_norms:
        return 0
    leading = np.median(np.sqrt([norms[:_SINK_POSITIONS] for norms in squared_norms]), axis=0)
    typical = np.median(np.sqrt(np.concatenate([norms[_SINK_POSITIONS:] for norms in squared_norms])), axis=0)
    high = np.flatnonzero((leading > _SINK_FACTOR * typical).any(axis=1))
    return int(high[-1]) + 1 if len(high) else 0
