"""What the tests of steering share: policies, prompts, and the program that runs them in engines of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tests.support.tiny import TinyModel

NEW_TOKENS = 24
BLOCK = 128
TWO_CHOICES = 5
"""Number of the run in which each prompt is answered twice."""
_BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * BLOCK  # keys and values, layers, heads, dimensions, float32
FEW_BLOCKS = {"kv_cache_memory_bytes": 6 * _BLOCK_BYTES, "max_model_len": 384}

Result = Mapping[str, Any]
HEAD = """\
version: "1"
detectors:
  - artifact: trigger.safetensors
steers:
{steers}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    hold_back: 0
    steers: [{always}]
    rules:
      - name: on-trigger
        when: {{detector: trigger, stage: {stage}}}
        do: {do}
        mode: {mode}
"""


def random_tokens(seed: int, length: int, *, trigger: int | None, without: int) -> list[int]:
    generator = np.random.default_rng(seed)
    tokens = [int(token) for token in generator.integers(1000, 40000, size=length) if token != without]
    while len(tokens) < length:
        tokens.append(999)
    if trigger is not None:
        tokens[10] = trigger
    return tokens


def run_entries(
    tiny: TinyModel,
    entries: Mapping[str, tuple[str, dict[str, Any], list[Any]]],
    folder: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    *,
    words: Sequence[int] = (),
    worded: Sequence[str] = (),
    asked: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] = MappingProxyType({}),
    operators: Path | None = None,
    program: str = "tests.engine.steered",
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Result]:
    """Engines with these policies, settings and batches, one after the other in one process.

    Those that are ``worded`` say nothing but ``words``.
    """
    order = [
        {
            "policy": str(tiny.path.parent / f"{policy}.yaml"),
            "engine": engine,
            "runs": runs,
            "new_tokens": new_tokens,
            "choices": [2 if number == TWO_CHOICES else 1 for number in range(len(runs))],
            "asked": list(asked.get(name, ())),
            "words": list(words) if name in worded else [],
            "broken": name == "broken",
            "operators": str(operators) if operators is not None and name == "clamped" else "",
        }
        for name, (policy, engine, runs) in entries.items()
    ]
    out = folder / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", program, str(tiny.path), str(out)],
        check=False,
        input=json.dumps(order),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(entries, json.loads(out.read_text()), strict=True))
