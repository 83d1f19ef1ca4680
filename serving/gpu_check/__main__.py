"""``python -m serving.gpu_check``: run the checks, write the report, say by the exit status whether all held.

Exit status: 0 all checks passed or were skipped, 1 a check failed, 2 the checks cannot be run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from probes.errors import TelltaleError
from serving.bench.machine import read_machine
from serving.gpu_check import GpuCheckError
from serving.gpu_check.result import Checks, Cost, GpuReport

if TYPE_CHECKING:
    import torch

EXIT_FAILED = 1
EXIT_IMPOSSIBLE = 2
TIERS = ("op", "engine", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        report = run(options)
    except TelltaleError as error:
        _say(f"gpu-check: {error}")
        return EXIT_IMPOSSIBLE
    for path in report.write(options.out, name=options.name):
        _say(f"wrote {path}")
    for check in report.failed:
        _say(f"FAILED {check.name}: {check.detail}")
    _say(f"{len(report.checks)} checks, {len(report.failed)} failed")
    return EXIT_FAILED if report.failed else 0


def run(options: argparse.Namespace) -> GpuReport:
    """Make the checks that the command line asks for.

    Raises:
        GpuCheckError: torch, CUDA or vLLM is missing.
    """
    machine = read_machine()  # before the load of the checks themselves
    device = _device(options.device)
    started = datetime.now(UTC)
    checks = Checks(_say)
    costs: tuple[Cost, ...] = ()
    figures: dict[str, object] = {}
    if options.tier in {"op", "all"}:
        from serving.gpu_check.operator import check_operator

        check_operator(checks, device)
        if device.type == "cuda" and not options.no_cost:
            from serving.gpu_check.cost import measure_costs

            found: list[Cost] = []
            checks.guard("op.cost", lambda: found.extend(measure_costs(device, _say)))
            costs = tuple(found)
        else:
            checks.skip(
                "op.cost", "left out with --no-cost" if options.no_cost else "times mean something on CUDA only"
            )
    if options.tier in {"engine", "all"}:
        if importlib.util.find_spec("vllm") is None:
            if options.tier == "engine":
                raise GpuCheckError("vLLM is not installed. Run: make install TELLTALE_DEVICE=cuda, or --tier op.")
            checks.skip("engine", "vLLM is not installed; make install TELLTALE_DEVICE=cuda")
        else:
            from serving.gpu_check.engine import check_engine

            figures = check_engine(
                checks, device, model=options.model, rounds=options.rounds, eager=options.eager, progress=_say
            )
    return GpuReport(started, _name(device), _command(options), machine, checks.made, costs, figures)


def _device(name: str) -> torch.device:
    if importlib.util.find_spec("torch") is None:
        raise GpuCheckError("torch is not installed in this Python. Run: make install TELLTALE_DEVICE=cuda.")
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU or no driver"
        raise GpuCheckError(
            f"there is no CUDA here ({why}; torch {torch.__version__}). Run it on a machine with an NVIDIA GPU, after "
            "make install TELLTALE_DEVICE=cuda there. --device cpu runs what does not need one."
        )
    return torch.device(name)


def _name(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return "cpu: not a GPU, nothing of CUDA was run"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _command(options: argparse.Namespace) -> str:
    parts = ["scripts/gpu_check.sh", f"--tier {options.tier}", f"--device {options.device}"]
    parts += [f"--model {Path(options.model).name}"] if options.model else []
    parts += ["--eager"] if options.eager else []
    parts += ["--no-cost"] if options.no_cost else []
    return " ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description="Check what Telltale needs of a GPU. Tier op needs torch alone, tier engine vLLM as well.",
    )
    parser.add_argument("--tier", choices=TIERS, default="all")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: what can be checked without CUDA"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the report")
    parser.add_argument("--name", default="gpu-check", help="name of the report's two files")
    parser.add_argument("--model", default=None, help="folder of the engine tier's model; the embedded one if left out")
    parser.add_argument("--rounds", type=int, default=7, help="of the throughput comparison; 0 leaves it out")
    parser.add_argument("--eager", action="store_true", help="engine tier without compilation and graphs")
    parser.add_argument("--no-cost", action="store_true", help="do not time the operator")
    return parser


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
