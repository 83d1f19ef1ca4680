"""What the taps read is what transformers computes: every position, once, however the batch was cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from tests.engine import parity
from tests.engine.capture import NEW_TOKENS

pytestmark = pytest.mark.engine

LAYERS = (0, 16, 29)
DIRECTIONS = 4


@pytest.fixture(scope="module")
def model() -> Path:
    return ensure_builtin_model(DEFAULT_MODEL, progress=lambda text: None).path


@pytest.fixture(scope="module")
def directions() -> dict[int, np.ndarray]:
    generator = np.random.default_rng(7)
    return {layer: parity.unit_rows(generator, DIRECTIONS, 576) for layer in LAYERS}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, model: Path, directions: dict[int, np.ndarray]) -> dict:
    return parity.captured_runs(tmp_path_factory.mktemp("parity"), model, directions)


@pytest.fixture(scope="module")
def reference(model: Path, captured: dict) -> dict[str, dict[int, np.ndarray]]:
    """transformers' residual stream after each layer, for the tokens of each captured request."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    last: list[torch.Tensor] = []
    network.model.layers[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    streams = {}
    with torch.inference_mode():
        for key in [key for key in captured if key.endswith(".tokens")]:
            last.clear()
            tokens = torch.tensor(captured[key])[None]
            states = network(tokens, output_hidden_states=True).hidden_states
            # hidden_states' last entry is normed: the last layer comes from the hook.
            pick = {layer: states[layer + 1] for layer in LAYERS[:-1]} | {LAYERS[-1]: last[0].reshape(states[0].shape)}
            streams[key.removesuffix(".tokens")] = {layer: value[0].double().numpy() for layer, value in pick.items()}
    return streams


@pytest.mark.covers("chunked prefill", "every position accounted for")
def test_every_position_is_read_once(captured: dict) -> None:
    parity.require_every_position_once(captured)


@pytest.mark.covers("warm prefix cache", "it really happens")
def test_the_batch_reused_cached_blocks(captured: dict) -> None:
    parity.require_replayed_blocks(captured)


@pytest.mark.covers(["chunked prefill", "warm prefix cache", "several requests at once"], "readouts equal transformers")
def test_readouts_equal_transformers(captured: dict, reference: dict, directions: dict[int, np.ndarray]) -> None:
    columns = json.loads(str(captured["columns"]))
    compared = 0
    for key, streams in reference.items():
        readouts = captured[f"{key}.readouts"]
        for layer, rows in directions.items():
            norm, *index = columns[f"resid_post.{layer}"]
            stream = streams[layer][: len(readouts)]
            expected = stream @ rows.T + parity.BIAS
            spread = np.maximum(1.0, expected[1:].std(axis=0))
            difference = np.abs(readouts[:, index] - expected)
            assert np.all(difference[1:] <= 1e-3 * spread)
            # The sink's norm is a hundred times the others': float32 itself ends at 1e-5 of it.
            assert np.all(difference[0] <= 1e-5 * np.linalg.norm(stream[0]))
            np.testing.assert_allclose(readouts[:, norm], (stream**2).sum(axis=1), rtol=1e-3)
            compared += expected.size
    assert compared == sum(len(captured[f"{key}.readouts"]) for key in reference) * DIRECTIONS * len(LAYERS)


@pytest.mark.covers("several requests at once", "isolation")
def test_batching_and_chunking_do_not_change_readouts(captured: dict) -> None:
    batch = len(parity.LENGTHS)
    columns = np.concatenate([index[1:] for index in json.loads(str(captured["columns"])).values()])
    for place in range(batch):
        alone, together = captured[f"{place}.0.readouts"], captured[f"{batch}.{place}.readouts"]
        assert captured[f"{place}.0.tokens"].tolist() == captured[f"{batch}.{place}.tokens"].tolist()
        assert len(alone) == parity.LENGTHS[place] + NEW_TOKENS - 1
        spread = np.maximum(1.0, alone[1:, columns].std(axis=0))
        assert np.all(np.abs(alone[1:, columns] - together[1:, columns]) <= 1e-3 * spread)
