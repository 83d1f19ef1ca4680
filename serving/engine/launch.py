"""Start vLLM's own API server in this process, monitored."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from probes.errors import TelltaleError
from serving.engine import compat
from serving.engine.runtime import CONFIG_VARIABLE

ENTRY_POINTS = {"vllm.general_plugins": "telltale", "vllm.endpoint_plugins": "telltale_api"}
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)


_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc gives the memory of each large activation back to the system, and gets zeroed pages for the next layer's. Kept
instead, long prompts take 8 % less (docs/benchmarks/kept-memory.md). 32 MiB is the most that every glibc takes."""


_NO_CREATED = "PROMETHEUS_DISABLE_CREATED_SERIES"
MOST_CHOICES = 128
"""That one request may ask for, as in OpenAI's API; vLLM's own 16384 are a whole server's work for hours."""


class LaunchError(TelltaleError, RuntimeError):
    """The server cannot be started as asked."""


def prepare_environment(policy: Path) -> None:
    """Set what the processes of the server read from their environment.

    Raises:
        LaunchError: the package's entry points are not installed.
        serving.engine.compat.CompatError: vLLM is missing or outside the supported range.
    """
    compat.require_version()
    for group, name in ENTRY_POINTS.items():
        if name not in {point.name for point in entry_points(group=group)}:
            raise LaunchError(
                f"the entry point {name!r} of {group} is not installed. Install telltale again: make install."
            )
    os.environ[CONFIG_VARIABLE] = str(policy.resolve())
    # Naming our endpoint plug-in switches vLLM's filter on for all groups: so all that are installed are named.
    names = {point.name for group in _PLUGIN_GROUPS for point in entry_points(group=group)}
    wanted = os.environ.get("VLLM_PLUGINS")
    chosen = names if wanted is None else {name for name in wanted.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(chosen | set(ENTRY_POINTS.values())))
    for name, value in server_environment().items():
        os.environ.setdefault(name, value)
    # When a server without an engine leaves is for ``lifeline`` to say, which tells all clients first.
    os.environ["VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"] = "1"


def server_environment() -> dict[str, str]:
    """What the server is started with unless the operator's environment says otherwise.

    On CUDA the model runner is vLLM's choice: V2, and V1 for what V2 cannot do. On a CPU it is V1: vLLM takes V2 there
    as soon as some Triton for CPUs is installed, and V2 through such a Triton is slow and little used. And on a CPU the
    processes keep the memory that they freed. ``/metrics`` leaves out when each counter began, which is a sixth of the
    page with many detectors: it is OpenMetrics', and nothing reads it as plain text.

    Raises:
        serving.engine.compat.CompatError: vLLM is missing.
    """
    values = {"VLLM_NO_USAGE_STATS": "1", "VLLM_MAX_N_SEQUENCES": str(MOST_CHOICES), _NO_CREATED: "true"}
    if compat.installed_version()[0] == compat.CPU_DISTRIBUTION:
        values |= {"VLLM_USE_V2_MODEL_RUNNER": "0", **_KEEP_MEMORY}
    return values


def require_free_port(host: str, port: int) -> None:
    """Say at once that a port is taken, before minutes are spent on loading.

    Raises:
        LaunchError: it is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {host}:{port} ({error.strerror}). Stop what listens there, or choose another --port."
            ) from error


def run_server(arguments: Sequence[str]) -> None:
    """Run ``vllm serve`` with these arguments until it ends.

    Raises:
        probes.errors.TelltaleError: the server refuses to serve unmonitored.
    """
    from serving.engine.plugin import install

    install()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # vLLM's own main looks up the version of a distribution that the CPU build does not have.
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="telltale")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    parsed = parser.parse_args([command.name, *arguments])
    configure_logging_from_args(parsed)
    command.validate(parsed)
    command.cmd(parsed)
