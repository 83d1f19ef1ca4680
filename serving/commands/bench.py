"""``telltale bench``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from probes.modelref import read_model_ref
from serving.arguments import parse_serve, vllm_arguments
from serving.bench import BenchError
from serving.bench.detectors import DIRECTIONS, LAYERS, write_monitored
from serving.bench.load import Workload
from serving.bench.machine import read_machine
from serving.bench.report import Report, Setting
from serving.bench.rounds import Bench, Comparison, require_unmonitored
from serving.bench.servers import Program, ended_by_signals, running
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from serving.commands.model import say
from serving.engine.launch import server_environment
from serving.engine.runtime import CONFIG_VARIABLE

_NOT_SHARED = {CONFIG_VARIABLE, "VLLM_PLUGINS"}
_SHARED_FLAGS = ("--no-enable-prefix-caching",)
_MONITORED = (
    f"{len(LAYERS)} taps (resid_post at the layers {', '.join(map(str, LAYERS))}), {DIRECTIONS} random directions at "
    "each, one linear detector for each direction. One policy, enforced, hold_back 0: one detector blocks at the "
    "prompt, the others flag at every token of the reply. The thresholds are never reached."
)


def bench(*, rounds: int, out: Path, workload: Workload | None = None) -> None:
    """Measure plain vLLM against ``telltale serve`` on the embedded model, and write the report.

    Args:
        rounds: alternating rounds.
        out: folder for the report.
        workload: another one than the default.
    Raises:
        probes.errors.TelltaleError: a server failed, the monitor did not see everything, or tokens differ.
    """
    workload = workload or Workload()
    machine = read_machine()
    if machine.load > machine.cores / 4:
        say(f"the load of this machine is {machine.load}: figures taken now are disturbed by what else runs")
    started, start = datetime.now(UTC), time.monotonic()
    folder = ensure_builtin_model(DEFAULT_MODEL, progress=say).path
    arguments = vllm_arguments(parse_serve(None, _SHARED_FLAGS, policy_model=DEFAULT_MODEL), folder)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="telltale-bench-") as work:
        comparison = _compare(Path(work), folder, arguments[1:], workload, rounds)
    setting = Setting(
        command=f"telltale bench --rounds {rounds}",
        model=DEFAULT_MODEL,
        flags=tuple(arguments[1:]),
        monitored=_MONITORED,
        workload=workload,
        started=started,
        seconds=time.monotonic() - start,
    )
    report = Report(machine, setting, comparison)
    paths = report.write(out)
    sys.stdout.write(report.markdown())
    say(f"wrote {' and '.join(str(path) for path in paths)}")
    if not report.identical:
        raise BenchError(
            f"{comparison.differing} of {comparison.replies} replies of Telltale are none that plain vLLM gave to the "
            "same prompt. Monitoring must not change a token: the report says so, and its figures are not a result."
        )


def _compare(work: Path, model: Path, flags: list[str], workload: Workload, rounds: int) -> Comparison:
    reference = read_model_ref(model, model_id=DEFAULT_MODEL, dtype="float32")
    policy = write_monitored(work, reference, model_id=DEFAULT_MODEL)
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_SHARED}
    # What telltale serve sets for itself, for both.
    environment = server_environment() | environment
    plain = Program(
        "plain vLLM",
        [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model), *flags],
        environment,
        "/health",
    )
    telltale = Program(
        "telltale",
        [sys.executable, "-m", "serving.cli", "serve", "--policy", str(policy), *flags],
        environment,
        "/ready",
    )
    with contextlib.ExitStack() as stack:
        servers = []
        for program in (plain, telltale):
            say(f"starting {program.name}")
            server = stack.enter_context(running(program, work))
            if program is plain:
                require_unmonitored(server)
            server.pause()
            servers.append(server)
        vocabulary = int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
        name = DEFAULT_MODEL.partition(":")[2]
        measured = Bench(*servers, model=name, workload=workload, vocabulary=vocabulary)
        comparison = measured.run(rounds, progress=say)
        say("stopping both servers")
    return comparison
