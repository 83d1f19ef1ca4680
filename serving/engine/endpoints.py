"""No HTTP server without our layers: vLLM goes on without a plug-in that could not be loaded, and serves unguarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from probes.errors import TelltaleError
from serving.engine.runtime import policy_path

OURS = "telltale_api"
"""Name of our entry point in ``vllm.endpoint_plugins``."""


class UnguardedError(TelltaleError, RuntimeError):
    """The server would answer requests without our layers."""


def require_ours(original: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """The loader of what adds routes, and the end of a server for which it has not loaded ours.

    Args:
        original: vLLM's; called before the server has an address.
    """

    def load_endpoint_plugins(supported_tasks: Sequence[str] | None = None) -> Sequence[Any]:
        found = original(supported_tasks)
        generates = supported_tasks is None or "generate" in supported_tasks
        if policy_path() is not None and generates and OURS not in {getattr(plugin, "name", None) for plugin in found}:
            raise UnguardedError(
                f"the plug-in {OURS!r} was not loaded, so that nobody would ask for keys or prove that the server is "
                "monitored. The log above may say why. Start the server with telltale serve, or name the plug-in, "
                f"beside telltale, in VLLM_PLUGINS: VLLM_PLUGINS=telltale,{OURS}."
            )
        return found

    return load_endpoint_plugins
