"""The command line of ``telltale serve``: what is ours, what is vLLM's, and the defaults of the embedded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from probes.errors import TelltaleError
from serving.builtin import DEFAULT_MODEL, is_builtin

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
_EMBEDDED = {
    "--dtype": ("float32",),
    "--enforce-eager": (),
    "--kv-cache-memory-bytes": ("1073741824",),
    "--max-num-seqs": ("64",),
}
"""The embedded model runs on a CPU: float32, eager, a cache of 1 GiB (about 23,000 tokens)."""


class ArgumentError(TelltaleError, ValueError):
    """The command line asks for something impossible."""


@dataclass(frozen=True, slots=True)
class ServeArguments:
    """A command line, taken apart.

    Attributes:
        model: as named by the user or the policy file.
        flags: vLLM's, as given.
        host, port: where the server will listen.
    """

    model: str
    flags: tuple[str, ...]
    host: str
    port: int


def parse_serve(model: str | None, flags: Sequence[str], *, policy_model: str | None) -> ServeArguments:
    """Take ``telltale serve MODEL FLAGS`` apart.

    Args:
        model: the positional argument.
        flags: all that is not ours.
        policy_model: the model that the policy file names.
    Raises:
        ArgumentError: two different models are named, or the port is not a number.
    """
    if value_of("--model", flags) is not None:
        raise ArgumentError("--model: name the model first instead: telltale serve MODEL.")
    if model is not None and policy_model is not None and model != policy_model:
        raise ArgumentError(
            f"the command line names the model {model!r}, the policy file {policy_model!r}. Name one of them, or none "
            "on the command line."
        )
    chosen = model or policy_model or DEFAULT_MODEL
    port = value_of("--port", flags) or str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:  # noqa: PLR2004 - ports are 16 bits
        raise ArgumentError(f"--port is {port!r}; it must be a number from 1 to 65535.")
    return ServeArguments(chosen, tuple(flags), value_of("--host", flags) or DEFAULT_HOST, int(port))


def vllm_arguments(arguments: ServeArguments, folder: Path | None) -> list[str]:
    """The arguments for ``vllm serve``.

    Args:
        arguments: of telltale serve.
        folder: of the embedded model, or None for any other.
    """
    defaults: dict[str, tuple[str, ...]] = {"--host": (DEFAULT_HOST,)}
    if folder is not None:
        defaults |= _EMBEDDED | {"--served-model-name": (arguments.model.partition(":")[2],)}
    return _with_defaults(arguments.model, arguments.flags, folder, defaults)


def engine_arguments(model: str, flags: Sequence[str], folder: Path | None) -> list[str]:
    """The arguments for an engine of vLLM without a server.

    Args:
        model: as named by the user.
        flags: vLLM's, as given.
        folder: of the embedded model, or None for any other.
    """
    return _with_defaults(model, flags, folder, _EMBEDDED if folder is not None else {})


def _with_defaults(
    model: str, flags: Sequence[str], folder: Path | None, defaults: Mapping[str, tuple[str, ...]]
) -> list[str]:
    missing = [item for flag, values in defaults.items() if not is_given(flag, flags) for item in (flag, *values)]
    return [str(folder) if folder is not None else model, *flags, *missing]


def is_embedded(model: str) -> bool:
    """Whether a model is one that telltale brings along."""
    return is_builtin(model)


def is_given(flag: str, flags: Sequence[str]) -> bool:
    """Whether a flag is among others, as ``--flag value``, ``--flag=value`` or ``--no-flag``."""
    names = {item.partition("=")[0].replace("_", "-") for item in flags if item.startswith("--")}
    return flag in names or f"--no-{flag.removeprefix('--')}" in names


def value_of(flag: str, flags: Sequence[str]) -> str | None:
    """The value of a flag, or None; of several, the last counts, as for vLLM."""
    found = None
    for number, item in enumerate(flags):
        if item == flag and number + 1 < len(flags):
            found = flags[number + 1]
        elif item.startswith(f"{flag}="):
            found = item.partition("=")[2]
    return found
