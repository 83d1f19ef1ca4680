"""``telltale bench``."""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from serving.arguments import parse_serve, vllm_arguments
from serving.bench import BenchError
from serving.bench.detectors import LAYERS, STEERED_LAYERS
from serving.bench.load import Workload
from serving.bench.machine import read_machine
from serving.bench.report import Report, Setting
from serving.bench.servers import ended_by_signals
from serving.bench.session import Subject, describe, measure
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from serving.commands.model import say
from serving.engine.launch import server_environment

_SHARED_FLAGS = ("--enable-prefix-caching", "--max-num-batched-tokens", "2048")
"""What vLLM's API server takes on a CPU by itself, said aloud: the report states the memory for these rows."""


def bench(*, rounds: int, starts: int, out: Path, steered: bool = False, workload: Workload | None = None) -> None:
    """Measure plain vLLM against ``telltale serve`` on the embedded model, and write the report.

    Args:
        rounds: alternating rounds, in all.
        starts: how often both servers are started; each time they have their share of the rounds.
        out: folder for the report.
        steered: whether every request is steered too.
        workload: another one than the default.
    Raises:
        probes.errors.TelltaleError: a server failed, the monitor did not see everything, a prefix was computed more
            than once, or tokens differ.
    """
    if rounds < starts:
        raise BenchError(
            f"--rounds {rounds} are fewer than --starts {starts}; each start needs a round at least. Give more "
            "--rounds, or fewer --starts."
        )
    workload = workload or Workload()
    machine = read_machine()
    if machine.load > machine.cores / 4:
        say(f"the load of this machine is {machine.load}: figures taken now are disturbed by what else runs")
    started, start = datetime.now(UTC), time.monotonic()
    folder = ensure_builtin_model(DEFAULT_MODEL, progress=say).path
    arguments = vllm_arguments(parse_serve(None, _SHARED_FLAGS, policy_model=DEFAULT_MODEL), folder)
    steered_layers = STEERED_LAYERS if steered else ()
    subject = Subject(DEFAULT_MODEL, DEFAULT_MODEL, folder, tuple(arguments[1:]), LAYERS, steered_layers)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="telltale-bench-") as work:
        measured = measure(subject, Path(work), workload, rounds=shares(rounds, starts), progress=say)
    setting = Setting(
        command=f"telltale bench --rounds {rounds} --starts {starts}{' --steered' if steered else ''}",
        model=DEFAULT_MODEL,
        flags=subject.flags,
        environment=server_environment(),
        monitored=describe(LAYERS, steered_layers),
        steered=steered,
        workload=workload,
        started=started,
        seconds=time.monotonic() - start,
    )
    report = Report(machine, setting, measured.comparison, measured.memory)
    paths = report.write(out)
    sys.stdout.write(report.markdown())
    say(f"wrote {' and '.join(str(path) for path in paths)}")
    require_sound(report)


def shares(rounds: int, starts: int) -> tuple[int, ...]:
    """The rounds, split among the starts as evenly as can be."""
    return tuple(rounds // starts + (number < rounds % starts) for number in range(starts))


def require_sound(report: Report) -> None:
    """Refuse to let figures stand that were taken of something else than what is promised.

    Raises:
        BenchError: tokens differ, or a shared prefix was computed more than once.
    """
    comparison = report.comparison
    if not report.identical:
        raise BenchError(
            f"{comparison.steady.differing} replies of Telltale to the steady load and {comparison.burst.differing} to "
            "the bursts are none that plain vLLM gave to the same prompt. Monitoring must not change a token: the "
            "report says so, and its figures are not a result."
        )
    if not comparison.computed_once:
        raise BenchError(
            "a prefix that requests of one burst share was not computed once in both servers: the report says how "
            "often, and its figures for the burst are not a result."
        )
