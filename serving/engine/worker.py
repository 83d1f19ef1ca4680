"""Workers with taps: vLLM's own classes whose model runner is replaced by ours."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

import serving
from serving.engine.runner_v1 import TappedCPUModelRunner, TappedRunner
from serving.engine.runtime import load_deployment


class WorkerStatus:
    """Mixin: what a worker says of itself when asked through ``collective_rpc``."""

    model_runner: Any
    vllm_config: Any

    def telltale_status(self) -> dict[str, Any]:
        """Version, digest of the plan, how often each tap has run, and digests of what it multiplies with."""
        runner = self.model_runner
        taps = runner.telltale_taps if isinstance(runner, TappedRunner) else None
        return {
            "version": serving.__version__,
            "digest": load_deployment(self.vllm_config).plan.digest,
            "taps": taps.fired() if taps is not None else {},
            "resident": taps.resident() if taps is not None else {},
        }


class TelltaleCPUWorker(WorkerStatus, CPUWorker):
    """vLLM's CPU worker, with taps."""

    def init_device(self) -> None:
        """Build vLLM's runner, then make it ours: the CPU worker offers no other way in."""
        super().init_device()
        self.model_runner.__class__ = TappedCPUModelRunner
