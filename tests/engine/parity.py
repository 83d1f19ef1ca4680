"""Directions, prompts and a captured run of them, for tests that compare readouts with what transformers computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.support.tiny import save_linear

BIAS = 0.25
BLOCK = 128  # tokens in a KV block of the CPU build
LENGTHS = (5, 40, 150)  # with 64 tokens in a step, the last one is cut into chunks


def unit_rows(generator: np.random.Generator, count: int, d_model: int) -> np.ndarray:
    """(count, d_model) random directions."""
    rows = generator.normal(size=(count, d_model))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def captured_runs(
    folder: Path, model: Path, directions: Mapping[int, np.ndarray], *, program: str = "tests.engine.capture"
) -> dict[str, np.ndarray]:
    """What ``capture`` saves of each prompt alone, and then of all together.

    Args:
        folder: an empty one.
        model: folder of the model.
        directions: by layer, (n, d_model).
        program: the module that captures.
    """
    names = []
    for layer, rows in directions.items():
        for number, row in enumerate(rows):
            names.append(f"d{layer}_{number}")
            save_linear(
                folder / f"{names[-1]}.safetensors", model, name=names[-1], direction=row, layer=layer, threshold=1e9,
                bias=BIAS,
            )  # fmt: skip
    entries = "\n".join(f"  - artifact: {name}.safetensors" for name in names)
    rule = f"{{name: watch, when: {{detector: {names[0]}, stage: prompt}}, do: {{action: flag}}, mode: enforce}}"
    (folder / "policy.yaml").write_text(
        f'version: "1"\ndetectors:\n{entries}\npolicies:\n'
        f"  - {{name: default, on_gap: block, on_uncalibrated: allow, rules: [{rule}]}}\n"
    )
    generator = np.random.default_rng(11)
    prompts = [generator.integers(1000, 40000, size=length).tolist() for length in LENGTHS]
    runs = [[prompt] for prompt in prompts] + [prompts]
    command = [sys.executable, "-m", program, str(model), str(folder / "policy.yaml"), str(folder / "out.npz")]
    subprocess.run(command, input=json.dumps({"runs": runs}), text=True, check=True, cwd=Path(__file__).parents[2])
    with np.load(folder / "out.npz") as saved:
        return dict(saved)


def require_every_position_once(captured: Mapping[str, np.ndarray]) -> None:
    """Assert that each row of each request was read once, in order."""
    keys = [key for key in captured if key.endswith(".positions")]
    assert len(keys) == 2 * len(LENGTHS)
    for key in keys:
        # The last sampled token is never fed back.
        assert captured[key].tolist() == list(range(len(captured[key.replace("positions", "tokens")]) - 1))


def require_replayed_blocks(captured: Mapping[str, np.ndarray]) -> None:
    """Assert that the batch rested on what each prompt, alone before, left in the prefix cache."""
    assert [int(captured[f"{number}.replayed"]) for number in range(len(LENGTHS))] == [0, 0, 0]
    assert int(captured[f"{len(LENGTHS)}.replayed"]) == BLOCK * (LENGTHS[-1] // BLOCK)
