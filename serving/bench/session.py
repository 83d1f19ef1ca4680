"""A session: both servers started, some rounds on them, the same again; and the memory of it. Writes no report."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from probes.modelref import read_model_ref
from serving.arguments import value_of
from serving.bench import BenchError
from serving.bench.detectors import DIRECTIONS, write_monitored
from serving.bench.load import Workload
from serving.bench.memory import Memory, benchmark_memory, large_example
from serving.bench.rounds import Bench, Comparison, require_unmonitored
from serving.bench.servers import Program, Server, running
from serving.engine.launch import server_environment
from serving.engine.runtime import CONFIG_VARIABLE

_NOT_SHARED = {CONFIG_VARIABLE, "VLLM_PLUGINS"}
_ROWS = "--max-num-batched-tokens"


@dataclass(frozen=True, slots=True)
class Subject:
    """What both servers serve.

    Attributes:
        model: as ``telltale serve`` is told.
        model_id: as the cards name it.
        folder: with its files.
        flags: vLLM's, the same for both; ``--served-model-name`` and ``--max-num-batched-tokens`` among them.
        layers: whose outputs Telltale reads.
    """

    model: str
    model_id: str
    folder: Path
    flags: tuple[str, ...]
    layers: Sequence[int]
    steered_layers: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out."""

    comparison: Comparison
    memory: tuple[Memory, ...]


def measure(
    subject: Subject, work: Path, workload: Workload, *, rounds: Sequence[int], progress: Callable[[str], None]
) -> Measured:
    """Start plain vLLM and Telltale, and measure them in turns.

    Args:
        subject: what they serve.
        work: an empty folder.
        workload: of one turn.
        rounds: how many count, for each time that both servers are started. A process keeps for its life the memory
            that it was given, and with it some per cent of its speed: only new processes show what is chance.
        progress: told what happens.
    Raises:
        probes.errors.TelltaleError: a server failed, or the monitor did not see everything.
    """
    served, rows = value_of("--served-model-name", subject.flags), value_of(_ROWS, subject.flags)
    if served is None or rows is None:
        raise BenchError(f"the flags {' '.join(subject.flags)} lack --served-model-name or {_ROWS}; both are needed.")
    reference = read_model_ref(subject.folder, model_id=subject.model_id, dtype="float32")
    policy = write_monitored(
        work, reference, model_id=subject.model, layers=subject.layers, steered_layers=subject.steered_layers
    )
    # What telltale serve sets for itself, for both.
    environment = server_environment() | {name: value for name, value in os.environ.items() if name not in _NOT_SHARED}
    vllm = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(subject.folder)]
    telltale = [sys.executable, "-m", "serving.cli", "serve", "--policy", str(policy)]
    programs = (
        Program("plain vLLM", [*vllm, *subject.flags], environment, "/health"),
        Program("telltale", [*telltale, *subject.flags], environment, "/ready"),
    )
    config = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
    comparison: Comparison | None = None
    for number, count in enumerate(rounds):
        with contextlib.ExitStack() as stack:
            servers: dict[Program, Server] = {}
            # Who starts first alternates: the second one gets what memory the first one left.
            for program in programs if number % 2 == 0 else programs[::-1]:
                progress(f"starting {program.name}")
                servers[program] = server = stack.enter_context(running(program, work))
                if program is programs[0]:
                    require_unmonitored(server)
                server.pause()
            pair = (servers[program] for program in programs)
            bench = Bench(*pair, model=served, workload=workload, vocabulary=int(config["vocab_size"]))
            before = len(comparison.rounds) if comparison is not None else 0
            found = bench.run(count, progress=progress, before=before)
            comparison = found if comparison is None else comparison.joined(found)
            progress("stopping both servers")
    if comparison is None:
        raise BenchError("no rounds were asked for. Give at least one start with at least one round.")
    own = benchmark_memory(
        policy, subject.folder, model_id=subject.model_id, max_rows=int(rows), cache=comparison.cache
    )
    return Measured(comparison, (own, large_example()))


def describe(layers: Sequence[int], steered_layers: Sequence[int] = ()) -> str:
    """What Telltale reads, enforces and writes, in a few sentences."""
    steered = (
        f" Every row of every request is steered after the layers {', '.join(map(str, steered_layers))}, by caps whose "
        "ceilings are out of reach: they cost what others do, and leave the tokens as they are, which is checked."
        if steered_layers
        else ""
    )
    return (
        f"{len(layers)} taps (resid_post at the layers {', '.join(map(str, layers))}), {DIRECTIONS} random directions "
        "at each, one linear detector for each direction. One policy, enforced, hold_back 0: one detector blocks at "
        f"the prompt, the others flag at every token of the reply. The thresholds are never reached.{steered}"
    )
