"""The V2 adapter against vLLM's own classes; only what belongs to a device (streams, events) is stood in for.

``tests/engine/test_v2_runner.py`` runs the same adapter in a whole engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from probes.taps import Tap
from serving.engine import pick_op
from serving.engine.pick_order import PICKS
from serving.engine.picks import install_pick
from serving.engine.readouts import ATTRIBUTE, WorkerReadouts
from serving.engine.rows import AsyncOutputWithReadouts, RowError, StepRows
from serving.engine.runner_v2 import TappedV2Runner
from tests.support.tapset import tap_set

CPU = torch.device("cpu")
MAX_ROWS = 16
WIDTH = 3


class Device:
    """Streams and events that only write down what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def stream(self, name: str) -> Any:
        device = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                device.log.append(f"{name} waits for {other}")

            def __str__(self) -> str:
                return name

        return Stream()

    def set_stream(self, stream: Any) -> None:
        self.log.append(f"on {stream}")

    def event(self, **settings: Any) -> Any:
        device = self

        class Event:
            def record(self, stream: Any) -> None:
                device.log.append(f"recorded on {stream}")

            def synchronize(self) -> None:
                device.log.append("waited")

        return Event()


class Inner(AsyncModelRunnerOutput):
    """The result that vLLM's sampling would give."""

    def __init__(self, output: ModelRunnerOutput) -> None:
        self.output = output

    def get_output(self) -> ModelRunnerOutput:
        return self.output


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "set_stream", device.set_stream)
    return device


def make_runner(device: Device, *, last: bool = True) -> tuple[TappedV2Runner, torch.nn.Module]:
    runner = object.__new__(TappedV2Runner)
    layer = torch.nn.Module()
    rows = torch.arange(MAX_ROWS * WIDTH, dtype=torch.float32).reshape(MAX_ROWS, WIDTH)
    layer.register_buffer("telltale_out", rows, persistent=False)
    runner.telltale_taps = tap_set({0: layer}, capacity=WIDTH - 1)
    runner.main_stream, runner.output_copy_stream = device.stream("main"), device.stream("copy")
    runner.is_last_pp_rank = last
    runner.execute_model_state = object()  # what a forward pass leaves for the sampling
    return runner, layer


def make_batch(buffers: InputBuffers, counts: list[int], *, padded_to: int) -> InputBatch:
    """vLLM's own batch with these rows of each request, padded as a graph pads it."""
    batch = InputBatch.make_dummy(len(counts), sum(counts), buffers)
    batch.req_ids = [f"request-{number}" for number in range(len(counts))]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    buffers.query_start_loc[: len(starts)] = torch.from_numpy(starts)
    buffers.query_start_loc[len(starts) :] = sum(counts)
    buffers.positions[: sum(counts)] = 100 + torch.arange(sum(counts))
    buffers.positions[sum(counts) :] = -7
    batch.query_start_loc = buffers.query_start_loc[: len(starts) + 2]  # with the padding of a FULL graph
    batch.positions = buffers.positions[:padded_to]
    batch.num_tokens_after_padding = padded_to
    return batch


def sampled(request_ids: list[str]) -> ModelRunnerOutput:
    return ModelRunnerOutput(req_ids=request_ids, req_id_to_index={name: i for i, name in enumerate(request_ids)})


@pytest.fixture
def buffers() -> InputBuffers:
    return InputBuffers(max_num_reqs=8, max_num_tokens=MAX_ROWS, device=CPU)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What vLLM's methods would do and return."""
    returns: dict[str, Any] = {"execute_model": None}
    for name in ("prepare_inputs", "sample_tokens", "execute_model"):
        monkeypatch.setattr(GPUModelRunner, name, lambda self, *args, _name=name, **kwargs: returns[_name])
    return returns


def step(runner: TappedV2Runner, stock: dict[str, Any], batch: InputBatch) -> Any:
    stock["prepare_inputs"] = batch
    stock["sample_tokens"] = Inner(sampled(batch.req_ids))
    runner.execute_model(SchedulerOutput.make_empty())
    assert runner.prepare_inputs(None, None, None, 0) is batch
    return runner.sample_tokens(None)


@pytest.mark.covers(["V2 runner", "padded rows"], "isolation")
def test_rows_and_positions_are_the_devices(device: Device, buffers: InputBuffers, stock: dict[str, Any]) -> None:
    runner, layer = make_runner(device)
    layer.telltale_out[9:] = float("nan")  # padding
    expected = layer.telltale_out[:9].clone()
    output = step(runner, stock, make_batch(buffers, [1, 5, 3], padded_to=12))
    assert isinstance(output, AsyncOutputWithReadouts)
    # The next step writes where this one's rows were, before anybody asked for the result.
    layer.telltale_out.fill_(-1.0)
    buffers.positions.fill_(-1)
    buffers.query_start_loc.fill_(-1)
    found: WorkerReadouts = getattr(output.get_output(), ATTRIBUTE)
    assert found.request_ids == ["request-0", "request-1", "request-2"]
    assert found.counts.tolist() == [1, 5, 3]
    assert found.positions.tolist() == list(range(100, 109))
    assert found.positions.dtype == found.counts.dtype == np.int64
    np.testing.assert_array_equal(found.readouts, expected.numpy())


@pytest.mark.covers("V2 runner", "every position accounted for")
def test_counts_are_not_the_hosts_bound(device: Device, buffers: InputBuffers, stock: dict[str, Any]) -> None:
    """With adaptive verification the host knows an upper bound for each request, and only the device the truth."""
    runner, _ = make_runner(device)
    batch = make_batch(buffers, [2, 4], padded_to=8)
    batch.num_scheduled_tokens = np.array([4, 4], dtype=np.int32)
    found = getattr(step(runner, stock, batch).get_output(), ATTRIBUTE)
    assert found.counts.tolist() == [2, 4]


def test_the_copy_waits_for_the_forward_pass_and_the_result_for_the_copy(
    device: Device, buffers: InputBuffers, stock: dict[str, Any]
) -> None:
    runner, _ = make_runner(device)
    output = step(runner, stock, make_batch(buffers, [2], padded_to=2))
    began = ["on copy", "copy waits for main", "recorded on copy", "on main"]
    assert device.log == began
    output.get_output()
    assert device.log == [*began, "waited"]


def test_whole_rows_that_were_asked_for_come_with_the_step_and_no_later_one(
    device: Device, buffers: InputBuffers, stock: dict[str, Any]
) -> None:
    runner, layer = make_runner(device)
    stream = torch.randn(MAX_ROWS, WIDTH, generator=torch.Generator().manual_seed(2))
    found = install_pick(runner.telltale_taps, Tap(0), d_model=WIDTH, device=CPU)
    assert found is not None
    runner.telltale_picks = found
    batch = make_batch(buffers, [1, 5, 3], padded_to=12)
    orders = {"request-1": (103, 999), "nobody": (1,)}
    told = []
    for wanted in (orders, {}):
        stock["prepare_inputs"], stock["sample_tokens"] = batch, Inner(sampled(batch.req_ids))
        scheduled = SimpleNamespace(**{PICKS: wanted})
        runner.execute_model(scheduled)
        runner.prepare_inputs(scheduled, None, None, 0)
        pick_op.pick_rows(stream, None, layer.telltale_pick_index, layer.telltale_pick_rows)  # as a graph runs it
        told.append(runner.sample_tokens(None))
    layer.telltale_pick_rows.fill_(-1.0)
    first, second = (getattr(output.get_output(), ATTRIBUTE) for output in told)
    assert first.picked.wanted == (("request-1", 103), ("request-1", 999))
    np.testing.assert_array_equal(first.picked.rows[0], stream[3].numpy())  # its rows begin at 1, with position 101
    assert np.isnan(first.picked.rows[1]).all()
    assert second.picked is None


def test_a_dummy_run_and_an_empty_step_have_no_rows(
    device: Device, buffers: InputBuffers, stock: dict[str, Any]
) -> None:
    runner, _ = make_runner(device)
    runner._telltale_rows = StepRows(["stale"], 1, buffers.query_start_loc, buffers.positions)
    runner.execute_model(SchedulerOutput.make_empty(), dummy_run=True, skip_attn_for_dummy_run=True)
    assert runner._telltale_rows is None
    stock["sample_tokens"] = inner = Inner(sampled([]))
    assert runner.sample_tokens(None) is inner
    assert not device.log


def test_rows_are_sent_once(device: Device, buffers: InputBuffers, stock: dict[str, Any]) -> None:
    runner, _ = make_runner(device)
    step(runner, stock, make_batch(buffers, [2], padded_to=2))
    stock["sample_tokens"] = again = Inner(sampled(["request-0"]))
    assert runner.sample_tokens(None) is again


def test_an_earlier_pipeline_stage_leaves_the_shared_output_alone(
    device: Device, buffers: InputBuffers, stock: dict[str, Any]
) -> None:
    runner, _ = make_runner(device, last=False)
    stock["prepare_inputs"] = make_batch(buffers, [2], padded_to=2)
    stock["sample_tokens"] = EMPTY_MODEL_RUNNER_OUTPUT
    runner.prepare_inputs(SchedulerOutput.make_empty())
    assert runner.sample_tokens(None) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, ATTRIBUTE)


def test_a_failed_forward_pass_sends_nothing(device: Device, buffers: InputBuffers, stock: dict[str, Any]) -> None:
    runner, _ = make_runner(device)
    stock["prepare_inputs"], stock["sample_tokens"] = make_batch(buffers, [2], padded_to=2), None
    runner.prepare_inputs(SchedulerOutput.make_empty())
    runner.execute_model_state = None
    assert runner.sample_tokens(None) is None
    assert not device.log


@pytest.mark.covers("V2 runner", "isolation")
def test_the_result_of_other_requests_is_refused(device: Device, buffers: InputBuffers, stock: dict[str, Any]) -> None:
    runner, _ = make_runner(device)
    batch = make_batch(buffers, [1, 2], padded_to=4)
    output = step(runner, stock, batch)
    output._inner.output = sampled(["request-1", "request-0"])
    with pytest.raises(RowError, match="reorders its batch"):
        output.get_output()


@pytest.mark.covers("V2 runner", "every position accounted for")
def test_rows_that_do_not_add_up_are_refused(device: Device, buffers: InputBuffers, stock: dict[str, Any]) -> None:
    runner, _ = make_runner(device)
    batch = make_batch(buffers, [1, 2], padded_to=4)
    batch.num_tokens = 4
    with pytest.raises(RowError, match="3 rows for a step of 4"):
        step(runner, stock, batch).get_output()


def test_the_buffer_holds_the_largest_graph() -> None:
    from types import SimpleNamespace

    runner = object.__new__(TappedV2Runner)
    runner.max_num_tokens = 8
    for sizes, rows in ((None, 8), ([], 8), ([1, 2, 4], 8), ([8, 16], 16)):
        runner.compilation_config = SimpleNamespace(cudagraph_capture_sizes=sizes)
        assert runner._telltale_max_rows() == rows


@pytest.mark.parametrize(("v2", "expected"), [(True, "TappedV2Runner"), (False, "TappedGPUModelRunner")])
def test_the_cuda_worker_makes_the_runner_that_vllm_chose(
    monkeypatch: pytest.MonkeyPatch, v2: bool, expected: str
) -> None:
    from serving.engine import runner_v1, runner_v2
    from serving.engine.worker_cuda import TelltaleCUDAWorker

    for cls in (runner_v1.TappedGPUModelRunner, runner_v2.TappedV2Runner):
        monkeypatch.setattr(cls, "__init__", lambda self, config, device: None)
    worker = object.__new__(TelltaleCUDAWorker)
    worker.use_v2_model_runner, worker.vllm_config, worker.device = v2, None, CPU
    assert type(worker._make_model_runner()).__name__ == expected
