"""Second tier: tokens per second and time to first token, monitored against plain vLLM, in alternating rounds."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from probes.modelref import read_model_ref
from serving.bench.detectors import write_monitored
from serving.bench.figures import THROUGHPUT_GOAL, TTFT_GOAL, Figures
from serving.bench.load import Burst, Steady, Workload
from serving.bench.rounds import Bench, require_unmonitored
from serving.bench.servers import Program, ended_by_signals, running
from serving.bench.statistics import PairedRatio
from serving.engine.launch import server_environment
from serving.engine.runtime import CONFIG_VARIABLE
from serving.gpu_check.result import Checks

_NOT_SHARED = {CONFIG_VARIABLE, "VLLM_PLUGINS"}
_NAME = "checked"
_DECISIVE = 0.1
"""An interval that is wider says nothing about a goal of a few per cent."""


def check_throughput(
    checks: Checks,
    device: torch.device,
    model: Path,
    model_id: str,
    *,
    work: Path,
    rounds: int,
    eager: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run both servers on the device, one stopped while the other is measured. Returns figures.

    Raises:
        serving.bench.BenchError: a server failed, or the monitor did not see everything.
    """
    cuda = device.type == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    reference = read_model_ref(model, model_id=model_id, dtype=dtype)
    folder = work / "throughput"
    folder.mkdir()
    layers = sorted({reference.num_layers // 4, reference.num_layers // 2, 3 * reference.num_layers // 4})
    # The policy names the folder that is served: telltale serve takes the model from it.
    policy = write_monitored(folder, reference, model_id=str(model), layers=layers)
    # Both are on the device at once, so neither may take all of it.
    flags = ["--host", "127.0.0.1", "--dtype", dtype, "--enable-prefix-caching", "--served-model-name", _NAME]
    flags += ["--max-num-seqs", "64", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 30)]
    flags += ["--gpu-memory-utilization", "0.4"] if cuda else []
    flags += ["--enforce-eager"] if eager or not cuda else []
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_SHARED}
    environment = server_environment() | environment
    api_server = "vllm.entrypoints.launchers.api_server.entry"
    programs = (
        Program(
            "plain vLLM", [sys.executable, "-m", api_server, "--model", str(model), *flags], environment, "/health"
        ),
        Program(
            "telltale",
            [sys.executable, "-m", "serving.cli", "serve", "--policy", str(policy), *flags],
            environment,
            "/ready",
        ),
    )
    workload = (
        Workload(Steady(concurrent=32, output_tokens=256))
        if cuda
        else Workload(Steady(concurrent=4, output_tokens=16), Burst(requests=4, output_tokens=4))
    )
    vocabulary = int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    with ended_by_signals(), contextlib.ExitStack() as stack:
        servers = []
        for program in programs:
            progress(f"starting {program.name}")
            server = stack.enter_context(running(program, folder))
            if program is programs[0]:
                require_unmonitored(server)
            server.pause()
            servers.append(server)
        bench = Bench(*servers, model=_NAME, workload=workload, vocabulary=vocabulary)
        comparison = bench.run(rounds, progress=progress)
    done = comparison.rounds
    steady = Figures("steady", tuple(one.plain.steady for one in done), tuple(one.telltale.steady for one in done))
    burst = Figures("burst", tuple(one.plain.burst for one in done), tuple(one.telltale.burst for one in done))
    throughput, ttft, replies = steady.throughput, steady.ttft, comparison.steady
    checks.require(
        "engine.throughput.tokens",
        replies.differing == 0 or replies.plain_variants > 1,
        f"{replies.differing} of {replies.replies} replies are none that plain vLLM gave; plain vLLM itself gave "
        f"up to {replies.plain_variants} to one prompt",
    )
    judge_ratio(checks, "engine.throughput.rate", throughput, at_least=THROUGHPUT_GOAL)
    judge_ratio(checks, "engine.throughput.first_token", ttft, at_most=TTFT_GOAL)
    checks.require(
        "engine.throughput.prefix",
        comparison.computed_once,
        f"of each burst, {comparison.shared_tokens} prompt tokens must come out of the prefix cache; "
        f"{sorted({turn.burst_prompts.cached for one in done for turn in (one.plain, one.telltale)})} did",
    )
    return {
        "throughput ratio": _plain(throughput),
        "time to first token ratio": _plain(ttft),
        "burst, throughput ratio": _plain(burst.throughput),
        "burst, time to first token ratio": _plain(burst.ttft),
        "rounds": rounds,
        "tokens per second, plain": [round(one.plain.steady.throughput, 1) for one in done],
        "tokens per second, telltale": [round(one.telltale.steady.throughput, 1) for one in done],
    }


def judge_ratio(
    checks: Checks, name: str, ratio: PairedRatio, *, at_least: float | None = None, at_most: float | None = None
) -> None:
    """Judge a ratio of Telltale over plain vLLM by its interval; one that is too wide decides nothing.

    Args:
        checks: taken down there.
        name: of the check.
        ratio: with its interval.
        at_least: the goal, if more is better.
        at_most: the goal, if less is better.
    """
    mean = ratio.geometric_mean
    goal = f"the goal is at least {at_least}" if at_least is not None else f"the goal is at most {at_most}"
    detail = f"{mean.point:.3f} ({mean.low:.3f} to {mean.high:.3f}) of plain vLLM; {goal}"
    missed = (at_least is not None and mean.high < at_least) or (at_most is not None and mean.low > at_most)
    met = (at_least is not None and mean.point >= at_least) or (at_most is not None and mean.point <= at_most)
    if missed:
        checks.require(name, False, detail)
    elif mean.high - mean.low > _DECISIVE or not met:
        checks.skip(name, f"{detail}: undecided. Run more --rounds on a machine that does nothing else")
    else:
        checks.require(name, True, detail)


def _plain(ratio: PairedRatio) -> list[float]:
    mean = ratio.geometric_mean
    return [round(mean.point, 4), round(mean.low, 4), round(mean.high, 4)]
