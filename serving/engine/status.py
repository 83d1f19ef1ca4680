"""What a worker is asked, on every device. Imports no worker: vLLM's CPU worker replaces CUDA's streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import serving
from probes.taps import Tap
from serving.engine.runtime import load_deployment


class WorkerStatus:
    """Mixin: what a worker answers, through ``collective_rpc``."""

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

    def telltale_write(self, columns: Sequence[Sequence[Any]]) -> dict[str, list[str]]:
        """Put directions into free columns of the taps that are on this worker.

        Args:
            columns: for each tap its name, the columns, and bytes of float32: weights (d_model, k), biases (k,).
        Returns: by the tap's name the digests of what stands in these columns now, read back from the device.
        """
        taps = getattr(self.model_runner, "telltale_taps", None)
        written: dict[str, list[str]] = {}
        if taps is None:
            return written
        for name, places, weight, bias in columns:
            matrix, offsets = (torch.frombuffer(bytearray(part), dtype=torch.float32) for part in (weight, bias))
            found = taps.write(Tap.parse(name), places, matrix.reshape(-1, len(places)), offsets)
            if found is not None:
                written[name] = found
        return written
