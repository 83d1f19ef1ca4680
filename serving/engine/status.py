"""What a worker says of itself, on every device. Imports no worker: vLLM's CPU worker replaces CUDA's streams."""

from __future__ import annotations

from typing import Any

import serving
from serving.engine.runtime import load_deployment


class WorkerStatus:
    """Mixin: what a worker says of itself when asked through ``collective_rpc``."""

    model_runner: Any
    vllm_config: Any

    def telltale_status(self) -> dict[str, Any]:
        """Version, digest of the plan, class of the runner, how often each tap has run and what it multiplies with."""
        taps = getattr(self.model_runner, "telltale_taps", None)
        return {
            "version": serving.__version__,
            "digest": load_deployment(self.vllm_config).plan.digest,
            "runner": type(self.model_runner).__name__,
            "taps": taps.fired() if taps is not None else {},
            "resident": taps.resident() if taps is not None else {},
        }
