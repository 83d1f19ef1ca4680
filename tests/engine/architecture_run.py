"""Load tiny models one after the other in this process, and read them through the registry, the taps and vLLM.

Run as a program, because vLLM's settings belong to a whole process: ``python -m tests.engine.architecture_run OUT.npz``
with ``{"models": {NAME: FOLDER}, "engines": {NAME: [FOLDER, POLICY]}, "tokens": [...]}`` on standard input.

``models`` run without the monitor, with a bank of the unit directions of the stream, so that each readout is the tapped
vector itself. ``engines`` run monitored, from the plug-in to the rows that the monitor observes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from probes.bank import Bank
from probes.detectors import Detector, Directions
from probes.steering.steer import stack_steers
from probes.taps import Site, Tap
from serving.engine.frontend import Frontend
from serving.engine.plugin import install
from serving.engine.steer_order import SteerOrder
from serving.engine.steers import SteerSet, install_steers
from serving.engine.taps import TapSet
from tests.engine.capture import capture
from tests.support.written import two_steers

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
    """Reads every dimension."""

    kind = "everything"

    def __init__(self, d_model: int, layers: Sequence[int], sites: Sequence[Site]) -> None:
        super().__init__(self.kind)
        self._taps = [Tap(layer, site) for layer in layers for site in sites]
        self._unit, self._zero = np.eye(d_model), np.zeros(d_model)

    @classmethod
    def from_artifact(cls, artifact: Any, *, name: str) -> Everything:
        raise TypeError(f"{cls.__name__} is made for a capture and has no artifact")

    def directions(self) -> Sequence[Directions]:
        return [Directions(tap, self._unit, self._zero) for tap in self._taps]

    def score(self, readouts: Any) -> Any:
        return next(iter(readouts.values()))[:, 0]


def everything(d_model: int, layers: Sequence[int], *, num_layers: int, sites: Sequence[Site] = tuple(Site)) -> Bank:
    """A bank of the unit directions at these sites of these layers."""
    return Bank([Everything(d_model, layers, sites)], d_model=d_model, num_layers=num_layers, capacity=d_model)


def register_here(architecture: str) -> None:
    """Give vLLM the class itself: it would start a process to look into each one that it knows by name only."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def main() -> None:
    """Read every model once."""
    asked = json.load(sys.stdin)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.environ.pop("TELLTALE_CONFIG", None)
    saved: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for name, folder in asked["models"].items():
        with timed(name):
            read(name, folder, asked["tokens"], saved, said)
    for name, (folder, policy) in asked["engines"].items():
        with timed(f"{name}, monitored"):
            register_here(name)
            os.environ["TELLTALE_CONFIG"] = policy
            # A process serves one engine. This one starts several in turn: forget the one before.
            Frontend.__init__(install())
            captured = capture(folder, [[asked["tokens"]], [asked["long"]], [asked["long"]]])
            saved |= {f"{name}.{key}": value for key, value in captured.items()}
    np.savez(sys.argv[1], said=np.array(json.dumps(said)), **saved)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say on standard error how long it took."""
    started = time.monotonic()
    yield
    gc.collect()
    sys.stderr.write(f"architecture_run: {what}: {time.monotonic() - started:.1f} s\n")


def read(name: str, folder: str, tokens: list[int], saved: dict[str, Any], said: dict[str, Any]) -> None:
    """Load, inject faults, check, run the tokens once, and keep what the taps wrote."""
    from vllm import LLM, SamplingParams

    from tests.engine.architecture_faults import Loaded, faults, stages

    register_here(name)
    llm = LLM(folder, skip_tokenizer_init=True, **SETTINGS)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    config = llm.llm_engine.vllm_config
    num_layers, d_model = config.model_config.get_total_num_hidden_layers(), config.model_config.get_hidden_size()
    bank_of = partial(everything, d_model, num_layers=num_layers)
    loaded = Loaded(runner.get_model(), config, num_layers, runner.max_num_tokens)
    said |= faults(name, loaded, bank_of)
    if name == "LlamaForCausalLM":
        said |= {f"stage {key}": value for key, value in stages(loaded, bank_of(range(num_layers))).items()}
    taps = loaded.tap(bank_of(range(num_layers)))
    loaded.check(taps)
    saved[f"{name}.fired_by_the_check"] = np.array(sum(taps.fired().values()))
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    rows = taps.collect(len(tokens)).numpy()
    for tap, columns in zip(taps.taps, taps.present_columns, strict=True):
        saved[f"{name}.{tap}"] = rows[:, columns]
    saved[f"{name}.fired"] = np.array(list(taps.fired().values()))
    steers = steer(taps, len(tokens), runner.max_num_tokens)
    llm.generate([{"prompt_token_ids": [*tokens[:-1], tokens[-1] + 1]}], params, use_tqdm=False)
    rows = taps.collect(len(tokens)).numpy()
    for tap, columns in zip(taps.taps, taps.present_columns, strict=True):
        saved[f"{name}.steered.{tap}"] = rows[:, columns]
    doses = steers.collect(len(tokens))
    assert doses is not None
    saved[f"{name}.doses"] = doses.numpy()


def steer(taps: TapSet, rows: int, max_rows: int) -> SteerSet:
    """Have the next step of so many rows written to, as ``tests.support.written`` says."""
    d_model = taps.bank.d_model
    steers, device = two_steers(d_model), torch.device("cpu")
    matrices = stack_steers(steers, d_model=d_model, num_layers=len(taps.stack.layers))
    made = install_steers(taps.stack, matrices, num_steers=len(steers), max_rows=max_rows, device=device)
    orders = [SteerOrder(number, *steer.span(rows)) for number, steer in enumerate(steers)]
    made.arm({"a": orders}, ["a"], torch.tensor([0, rows]), torch.arange(rows))
    return made


if __name__ == "__main__":
    main()
