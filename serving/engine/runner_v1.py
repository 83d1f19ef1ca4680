"""The V1 model runner with taps: row order from ``_prepare_inputs``, readouts copied out with the step's result.

On a pipeline, a stage hands what its taps read to the next one beside the hidden states; only the last one answers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.sequence import IntermediateTensors
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from serving.engine.pick_order import PICKS, PickedRows
from serving.engine.picks import Picked, PickSet, make_pickable
from serving.engine.readouts import ATTRIBUTE, WorkerReadouts
from serving.engine.seeds import SeededCPURunner
from serving.engine.selfcheck import tap_model
from serving.engine.steer_order import STEERS
from serving.engine.steers import SteerSet, make_writable
from serving.engine.taps import TapSet

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


UPSTREAM = "telltale_readouts"
"""Key of the readouts among the tensors that one pipeline stage sends to the next."""


class AsyncOutputWithReadouts(AsyncModelRunnerOutput):
    """vLLM's asynchronous result, joined by the readouts of the same step once both have reached the host."""

    def __init__(self, inner: AsyncModelRunnerOutput, rows: _Rows, found: _Found, *, seconds: float) -> None:
        began = time.perf_counter()
        self._inner = inner
        self._rows = rows
        self._device = found  # kept until the copy is done
        self._host = found.begin_copy()
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        self._seconds = seconds + time.perf_counter() - began

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the copies and attach the readouts."""
        output = self._inner.get_output()
        began = time.perf_counter() - self._seconds
        self._copied.synchronize()
        del self._device
        return _attach(output, self._rows, self._host, began=began)


class _Found(NamedTuple):
    """What a step left on the device, row by row, owned by nobody else."""

    readouts: torch.Tensor
    positions: torch.Tensor
    doses: torch.Tensor | None
    picked: Picked | None

    def begin_copy(self) -> _Found:
        """The same on the host, once the device has come so far."""
        doses = self.doses.to("cpu", non_blocking=True) if self.doses is not None else None
        picked = self.picked
        if picked is not None:
            picked = Picked(picked.wanted, picked.rows.to("cpu", non_blocking=True))
        readouts, positions = (part.to("cpu", non_blocking=True) for part in (self.readouts, self.positions))
        return _Found(readouts, positions, doses, picked)


class _Rows:
    """Which rows of the step belong to whom."""

    def __init__(self, request_ids: list[str], counts: npt.NDArray[np.int64]) -> None:
        self.request_ids = request_ids
        self.counts = counts

    @property
    def total(self) -> int:
        """Rows of the step."""
        return int(self.counts.sum())


class TappedRunner(GPUModelRunner):
    """What the V1 runners share; every method that it overrides stands in ``serving.engine.compat``."""

    intermediate_tensors: IntermediateTensors | None
    telltale_taps: TapSet | None = None
    telltale_picks: PickSet | None = None
    telltale_steers: SteerSet | None = None
    _telltale_rows: _Rows | None = None
    _telltale_upstream: torch.Tensor | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then tap the layers: before any profile run, compilation or capture sees them."""
        super().load_model(*args, **kwargs)
        model, rows = self.get_model(), self.max_num_tokens
        self.telltale_taps = tap_model(model, self.vllm_config, max_rows=rows, device=self.device)
        self.telltale_picks = make_pickable(self.telltale_taps, self.vllm_config, device=self.device)
        self.telltale_steers = make_writable(self.telltale_taps, self.vllm_config, max_rows=rows, device=self.device)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Forget the rows of the step before (a step without tokens has none); send on what this stage has read."""
        self._telltale_rows = self._telltale_upstream = None
        output = super().execute_model(scheduler_output, *args, **kwargs)
        return self._with_readouts(output) if isinstance(output, IntermediateTensors) else output

    def sync_and_gather_intermediate_tensors(
        self, num_tokens: int, intermediate_tensors: IntermediateTensors | None, sync_self: bool
    ) -> IntermediateTensors:
        """Take the readouts of the stages before out of what they sent."""
        if intermediate_tensors is not None:
            self._telltale_upstream = intermediate_tensors.tensors.pop(UPSTREAM, None)
        if self.intermediate_tensors is None:
            # vLLM makes this buffer in its warm-up, which an eager CPU engine with a given cache size leaves out.
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return super().sync_and_gather_intermediate_tensors(num_tokens, intermediate_tensors, sync_self)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: npt.NDArray[np.int32]) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        # Only here is the row order final: requests were added, removed and reordered before.
        self._telltale_rows = rows = _Rows(list(self.input_batch.req_ids), num_scheduled_tokens.astype(np.int64))
        takers = [(self.telltale_steers, STEERS), (self.telltale_picks, PICKS)]
        if any(taker is not None for taker, _ in takers):
            starts = torch.from_numpy(np.concatenate([[0], np.cumsum(rows.counts)])).to(self.device, non_blocking=True)
            for taker, key in takers:
                if taker is not None:
                    orders = getattr(scheduler_output, key, {})
                    taker.arm(orders, rows.request_ids, starts, self.positions[: rows.total])
        return prepared

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Attach the readouts to the result of the step."""
        output = super().sample_tokens(*args, **kwargs)
        rows, taps = self._telltale_rows, self.telltale_taps
        if rows is None or taps is None or output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        began = time.perf_counter()
        doses = self.telltale_steers.collect(rows.total) if self.telltale_steers is not None else None
        picked = self.telltale_picks.collect() if self.telltale_picks is not None else None
        found = _Found(self._collect(rows.total), self.positions[: rows.total].clone(), doses, picked)
        if isinstance(output, AsyncModelRunnerOutput):
            return AsyncOutputWithReadouts(output, rows, found, seconds=time.perf_counter() - began)
        if isinstance(output, ModelRunnerOutput):
            return _attach(output, rows, found, began=began, taps=taps.take_seconds())
        return output

    def _with_readouts(self, sent: IntermediateTensors) -> IntermediateTensors:
        rows = self._telltale_rows
        return sent if rows is None else IntermediateTensors({**sent.tensors, UPSTREAM: self._collect(rows.total)})

    def _collect(self, num_rows: int) -> torch.Tensor:
        assert self.telltale_taps is not None  # noqa: S101 - rows are noted only once the model is loaded
        return self.telltale_taps.collect(num_rows, self._telltale_upstream)


def _attach(
    output: ModelRunnerOutput, rows: _Rows, found: _Found, *, began: float, taps: float | None = None
) -> ModelRunnerOutput:
    """Attach what has reached the host, how long that took since ``began``, and what the taps took before."""
    doses = found.doses.numpy() if found.doses is not None else None
    picked = PickedRows(found.picked.wanted, found.picked.rows.numpy()) if found.picked is not None else None
    readouts, positions = found.readouts.numpy(), found.positions.numpy()
    seconds = time.perf_counter() - began
    sent = WorkerReadouts(
        rows.request_ids, rows.counts, positions, readouts, doses, picked, seconds=seconds, tap_seconds=taps
    )
    setattr(output, ATTRIBUTE, sent)
    return output


class TappedCPUModelRunner(TappedRunner, SeededCPURunner):
    """The CPU's runner, with taps."""


class TappedGPUModelRunner(TappedRunner, GPUModelRunner):
    """The V1 runner on CUDA, with taps."""
