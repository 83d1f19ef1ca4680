"""vLLM's V2 model runner, the one of GPUs, in a whole engine: what the taps read is what transformers computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine import parity
from tests.engine.capture import NEW_TOKENS
from tests.support.tiny import D_MODEL, NUM_LAYERS, TinyModel

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
DIRECTIONS = 3

CUDA_PROCESS = """
import sys
import serving.engine.worker_cuda, serving.engine.runner_v1, serving.engine.runner_v2, serving.engine.plugin
from serving.engine import compat
changed = [point.name for point in compat.touchpoints("cuda") if point.found() != point.sha256]
import torch
print(changed, [name for name in sys.modules if name in ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu.shm")],
      torch.cuda.Event.__module__, torch.cuda.Stream.__module__)
"""


@pytest.fixture(scope="module")
def directions() -> dict[int, np.ndarray]:
    generator = np.random.default_rng(7)
    return {layer: parity.unit_rows(generator, DIRECTIONS, D_MODEL) for layer in range(NUM_LAYERS)}


@pytest.fixture(scope="module")
def captured(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory, directions: dict[int, np.ndarray]) -> dict:
    pytest.importorskip("triton", reason="the kernels of V2 are Triton's")
    folder = tmp_path_factory.mktemp("v2")
    return parity.captured_runs(folder, tiny.path, directions, program="tests.engine.capture_v2")


@pytest.mark.covers(["V2 runner", "chunked prefill"], "every position accounted for")
@pytest.mark.slow
def test_every_position_is_read_once(captured: dict) -> None:
    parity.require_every_position_once(captured)


@pytest.mark.covers("warm prefix cache", "it really happens")
@pytest.mark.slow
def test_cached_blocks_are_replayed(captured: dict) -> None:
    parity.require_replayed_blocks(captured)


@pytest.mark.covers(["V2 runner", "warm prefix cache"], "readouts equal transformers")
@pytest.mark.slow
def test_readouts_equal_transformers(captured: dict, tiny: TinyModel, directions: dict[int, np.ndarray]) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32, attn_implementation="eager").eval()
    after: list[torch.Tensor] = []
    for layer in network.model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: after.append(output[0] if isinstance(output, tuple) else output)
        )
    columns = json.loads(str(captured["columns"]))
    for key in [key for key in captured if key.endswith(".readouts")]:
        readouts = captured[key]
        tokens = captured[key.replace("readouts", "tokens")]
        assert len(readouts) == len(tokens) - 1
        after.clear()
        with torch.inference_mode():
            network(torch.tensor(tokens)[None])
        for layer, state in enumerate(after):
            norm, *index = columns[f"resid_post.{layer}"]
            stream = state.reshape(-1, D_MODEL)[: len(readouts)].double().numpy()
            expected = stream @ directions[layer].T + parity.BIAS
            assert np.all(np.abs(readouts[:, index] - expected) <= 1e-3 * np.maximum(1.0, expected.std(axis=0)))
            np.testing.assert_allclose(readouts[:, norm], (stream**2).sum(axis=1), rtol=1e-3)


@pytest.mark.covers("V2 runner", "isolation")
@pytest.mark.slow
def test_batch_mates_and_chunks_change_nothing(captured: dict) -> None:
    batch = len(parity.LENGTHS)
    for place, length in enumerate(parity.LENGTHS):
        alone, together = captured[f"{place}.0.readouts"], captured[f"{batch}.{place}.readouts"]
        assert captured[f"{place}.0.tokens"].tolist() == captured[f"{batch}.{place}.tokens"].tolist()
        assert len(alone) == length + NEW_TOKENS - 1
        np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-2)


def test_a_cuda_process_never_imports_the_cpu_worker() -> None:
    """vLLM's CPU worker replaces CUDA's events and streams by objects that do nothing, wherever it is imported."""
    done = subprocess.run([sys.executable, "-c", CUDA_PROCESS], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] [] torch.cuda.streams torch.cuda.streams"
