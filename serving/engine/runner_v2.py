"""The V2 model runner with taps: rows from ``prepare_inputs``, readouts copied out beside the step's sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from serving.engine.pick_order import PICKS
from serving.engine.picks import PickSet, make_pickable
from serving.engine.rows import AsyncOutputWithReadouts, ReadoutCopy, StepRows
from serving.engine.selfcheck import tap_model
from serving.engine.steer_order import STEERS
from serving.engine.steers import SteerSet, make_writable
from serving.engine.taps import TapSet

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch


class TappedV2Runner(GPUModelRunner):
    """vLLM's V2 runner, with taps; every method that it overrides stands in ``serving.engine.compat``.

    A replayed CUDA graph runs no Python of the model: all that happens here is around it, in the methods that run at
    every step. The taps themselves are in the graph, with their buffers.
    """

    telltale_taps: TapSet | None = None
    telltale_picks: PickSet | None = None
    telltale_steers: SteerSet | None = None
    _telltale_rows: StepRows | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then tap the layers: before any profile run, compilation or capture sees them."""
        super().load_model(*args, **kwargs)
        model, rows = self.get_model(), self._telltale_max_rows()
        self.telltale_taps = tap_model(model, self.vllm_config, max_rows=rows, device=self.device)
        self.telltale_picks = make_pickable(self.telltale_taps, self.vllm_config, device=self.device)
        self.telltale_steers = make_writable(self.telltale_taps, self.vllm_config, max_rows=rows, device=self.device)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Forget the rows of the step before: a dummy run and a step without tokens have none."""
        self._telltale_rows = None
        return super().execute_model(scheduler_output, *args, **kwargs)

    def prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> InputBatch:
        """Keep the layout of the rows, and say which are written to. Dummy runs do not come here."""
        batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        self._telltale_rows = StepRows(batch.req_ids, batch.num_tokens, batch.query_start_loc, batch.positions)
        starts, positions = batch.query_start_loc[: len(batch.req_ids) + 1], batch.positions[: batch.num_tokens]
        if self.telltale_steers is not None:
            self.telltale_steers.arm(getattr(scheduler_output, STEERS, {}), batch.req_ids, starts, positions)
        if self.telltale_picks is not None:
            self.telltale_picks.arm(getattr(scheduler_output, PICKS, {}), batch.req_ids, starts, positions)
        return batch

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Attach the readouts to the result of the step; their copy runs beside the sampling."""
        copy = self._telltale_begin_copy()
        output = super().sample_tokens(*args, **kwargs)
        if copy is None or not isinstance(output, AsyncModelRunnerOutput):
            # A pipeline stage before the last answers with vLLM's shared empty output: nothing may hang on it.
            return output
        return AsyncOutputWithReadouts(output, copy)

    def _telltale_begin_copy(self) -> ReadoutCopy | None:
        rows, taps = self._telltale_rows, self.telltale_taps
        self._telltale_rows = None
        if rows is None or taps is None or self.execute_model_state is None or not self.is_last_pp_rank:
            return None
        steers, picks = self.telltale_steers, self.telltale_picks
        return ReadoutCopy(
            rows,
            taps.collect(rows.num_rows),
            steers.collect(rows.num_rows) if steers is not None else None,
            picks.collect() if picks is not None else None,
            main_stream=self.main_stream,
            copy_stream=self.output_copy_stream,
        )

    def _telltale_max_rows(self) -> int:
        """The most rows that a forward pass can have, with the padding of graphs."""
        captured = self.compilation_config.cudagraph_capture_sizes or ()
        return max(int(self.max_num_tokens), *(int(size) for size in captured), 0)


class TappedV2CPUModelRunner(TappedV2Runner, CPUModelRunner):
    """The V2 runner on a CPU, with taps: vLLM has it where a Triton for CPUs is installed."""
