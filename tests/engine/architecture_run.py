"""Load tiny models one after the other in this process, and read them through the registry, the taps and vLLM.

Run as a program, because vLLM's settings belong to a whole process: ``python -m tests.engine.architecture_run OUT.npz``
with ``{"models": {NAME: FOLDER}, "tokens": [...]}`` on standard input. Its bank has the unit directions of the stream,
so that each readout is the tapped vector itself.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from probes.bank import Bank
from probes.detectors import Detector, Directions
from probes.taps import Site, Tap

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 67108864,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "disable_log_stats": True,
}


class Everything(Detector):
    """Reads every dimension at every site of every layer."""

    kind = "everything"

    def __init__(self, d_model: int, num_layers: int) -> None:
        super().__init__(self.kind)
        self._taps = [Tap(layer, site) for layer in range(num_layers) for site in Site]
        self._unit, self._zero = np.eye(d_model), np.zeros(d_model)

    @classmethod
    def from_artifact(cls, artifact: Any, *, name: str) -> Everything:
        raise NotImplementedError("it is not stored")

    def directions(self) -> Sequence[Directions]:
        return [Directions(tap, self._unit, self._zero) for tap in self._taps]

    def score(self, readouts: Any) -> Any:
        return next(iter(readouts.values()))[:, 0]


def everything(d_model: int, num_layers: int) -> Bank:
    """A bank of the unit directions at all taps."""
    return Bank([Everything(d_model, num_layers)], d_model=d_model, num_layers=num_layers, capacity=d_model)


def register_here(architecture: str) -> None:
    """Give vLLM the class itself: it would start a process to look into each one that it knows by name only."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def main() -> None:
    """Read every model once."""
    asked = json.load(sys.stdin)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.environ.pop("TELLTALE_CONFIG", None)
    started = time.monotonic()
    import torch
    from vllm import LLM, SamplingParams

    from serving.engine.selfcheck import check_taps
    from serving.engine.taps import install_taps

    saved: dict[str, np.ndarray] = {"seconds.import": np.array(time.monotonic() - started)}
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    for name, folder in asked["models"].items():
        started = time.monotonic()
        register_here(name)
        llm = LLM(folder, skip_tokenizer_init=True, **SETTINGS)
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        config, device = llm.llm_engine.vllm_config, torch.device("cpu")
        model = runner.get_model()
        bank = everything(config.model_config.get_hidden_size(), config.model_config.get_total_num_hidden_layers())
        taps = install_taps(model, bank, num_layers=config.model_config.get_total_num_hidden_layers(),
                            max_rows=runner.max_num_tokens, device=device)  # fmt: skip
        check_taps(model, taps, config, device=device)
        assert set(taps.fired().values()) == {0}
        llm.generate([{"prompt_token_ids": asked["tokens"]}], params, use_tqdm=False)
        rows = taps.collect(len(asked["tokens"])).numpy()
        for tap, columns in zip(bank.taps, taps.present_columns, strict=True):
            saved[f"{name}.{tap}"] = rows[:, columns]
        saved[f"{name}.fired"] = np.array([taps.fired()[str(tap)] for tap in bank.taps])
        saved[f"seconds.{name}"] = np.array(time.monotonic() - started)
        sys.stderr.write(f"architecture_run: {name} {float(saved[f'seconds.{name}']):.1f} s\n")
        del llm, runner, model, taps
        gc.collect()
    np.savez(sys.argv[1], **saved)


if __name__ == "__main__":
    main()
