"""The rows of one step on their way to the host: whose they are, where they stand, and what the taps read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream

from probes.errors import TelltaleError
from serving.engine.pick_order import PickedRows
from serving.engine.picks import Picked
from serving.engine.readouts import ATTRIBUTE, WorkerReadouts


class RowError(TelltaleError, RuntimeError):
    """Rows and requests of a step do not belong together: nothing of it may be scored."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """Which rows of the step belong to whom, as the device has it.

    Attributes:
        request_ids: in the order of the batch.
        num_rows: of the step, without padding.
        starts: (at least R + 1,) int32 on the device: request i has the rows from starts[i] to starts[i + 1].
        positions: (at least num_rows,) int64 on the device, absolute.
    """

    request_ids: list[str]
    num_rows: int
    starts: torch.Tensor
    positions: torch.Tensor


class ReadoutCopy:
    """A copy to the host that was begun, and is waited for where the step's result is.

    Positions and counts are copied with the readouts rather than taken from the host's books: with speculative
    decoding and asynchronous scheduling those are bounds, and rows are moved on the device.

    Args:
        rows: of the step.
        readouts: (num_rows, width of the bank) float32, owned by nobody else.
        doses: (num_rows, steers) float32, likewise; None if nothing was written.
        picked: whole rows that were asked for; None if none were.
        main_stream: where the readouts were computed, and the current stream.
        copy_stream: where they are copied, beside the sampling.
    """

    def __init__(
        self,
        rows: StepRows,
        readouts: torch.Tensor,
        doses: torch.Tensor | None = None,
        picked: Picked | None = None,
        *,
        main_stream: Any,
        copy_stream: Any,
    ) -> None:
        self._rows = rows
        # The next step writes into vLLM's own buffers: what is copied later must not lie in them. The device's
        # tensors are kept until the copy is done, because they belong to another stream than the copy's.
        self._device = (
            readouts,
            rows.positions[: rows.num_rows].clone(),
            rows.starts[: len(rows.request_ids) + 1].clone(),
            doses,
            None if picked is None else picked.rows,
        )
        self._wanted = () if picked is None else picked.wanted
        self._copied: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with stream(copy_stream, main_stream):
            copy_stream.wait_stream(main_stream)
            self._host = tuple(None if tensor is None else async_copy_to_np(tensor) for tensor in self._device)
            self._copied.record(copy_stream)

    def attach(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Wait for the copy and hang the rows on the step's result.

        Raises:
            RowError: the result is that of other requests, or rows are missing.
        """
        began = time.perf_counter()
        self._copied.synchronize()
        del self._device
        readouts, positions, starts, doses, picked = self._host
        assert readouts is not None and positions is not None and starts is not None  # noqa: S101 - always copied
        counts = np.diff(starts).astype(np.int64)
        self._check(output.req_ids, counts)
        rows = None if picked is None else PickedRows(self._wanted, picked)
        found = WorkerReadouts(
            self._rows.request_ids,
            counts,
            positions.astype(np.int64),
            readouts,
            doses,
            rows,
            seconds=time.perf_counter() - began,
        )
        setattr(output, ATTRIBUTE, found)
        return output

    def _check(self, request_ids: list[str], counts: npt.NDArray[np.int64]) -> None:
        if request_ids != self._rows.request_ids:
            raise RowError(
                f"the step's result names {len(request_ids)} requests ({', '.join(request_ids[:3])}...), its rows "
                f"were laid out for {len(self._rows.request_ids)} ({', '.join(self._rows.request_ids[:3])}...). This "
                "vLLM reorders its batch where telltale does not see it: install a version in the supported range."
            )
        if int(counts.sum()) != self._rows.num_rows or bool((counts < 0).any()):
            raise RowError(
                f"the device laid out {int(counts.sum())} rows for a step of {self._rows.num_rows}. This vLLM cuts "
                "its batch where telltale does not see it: install a version in the supported range."
            )


class AsyncOutputWithReadouts(AsyncModelRunnerOutput):
    """vLLM's asynchronous result, joined by the readouts of the same step once both have reached the host.

    Args:
        inner: vLLM's.
        copy: begun in the same step.
    """

    def __init__(self, inner: AsyncModelRunnerOutput, copy: ReadoutCopy) -> None:
        self._inner = inner
        self._copy = copy

    def get_output(self) -> ModelRunnerOutput:
        """Wait for both copies and attach the readouts."""
        return self._copy.attach(self._inner.get_output())
