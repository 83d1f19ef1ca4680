"""Run prompts through a monitored engine in this process and keep every row that its monitor saw, computed or replayed.

Run as a program, because an engine's settings and wraps belong to a whole process:
``python -m tests.engine.capture MODEL POLICY OUT.npz``. Reads ``{"runs": [[[token, ...], ...], ...]}`` from standard
input: each run is one batch of prompts.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

NEW_TOKENS = 12


def main() -> None:
    """Capture."""
    model, policy, out = sys.argv[1:4]
    runs: list[list[list[int]]] = json.load(sys.stdin)["runs"]
    os.environ |= {"TELLTALE_CONFIG": policy, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    np.savez(out, **capture(model, runs))


def capture(model: str, runs: list[list[list[int]]]) -> dict[str, np.ndarray]:
    """Run batches of prompts through one monitored engine; the environment names the policy."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=268435456,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    monitor = llm.llm_engine.engine_core.engine_core.scheduler._monitor
    rows: list[tuple[str, int, np.ndarray]] = []
    observe = monitor.observe

    def keep(step: Any) -> None:
        for name, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
            rows.extend((name, int(step.positions[i]), step.readouts[i].copy()) for i in range(start, start + count))
        observe(step)

    replay = monitor.replay
    replayed: list[int] = []

    def keep_replay(name: str, readouts: np.ndarray) -> None:
        rows.extend((name, position, row.copy()) for position, row in enumerate(readouts))
        replayed.append(len(readouts))
        replay(name, readouts)

    monitor.observe, monitor.replay = keep, keep_replay
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    columns = {tap: [int(monitor.plan.bank.norm_column(tap))] for tap in monitor.plan.bank.taps}
    for name, places in monitor.plan.bank.columns.items():
        for tap, index in places.items():
            columns[tap].append(int(index[0]))
            del name
    saved: dict[str, np.ndarray] = {}
    for number, prompts in enumerate(runs):
        rows.clear()
        replayed.clear()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        saved[f"{number}.replayed"] = np.array(sum(replayed))
        internal = sorted({name for name, _, _ in rows}, key=lambda name: int(name.split("-")[0]))
        for place, (prompt, output, name) in enumerate(zip(prompts, outputs, internal, strict=True)):
            mine = [(position, row) for owner, position, row in rows if owner == name]
            saved[f"{number}.{place}.tokens"] = np.array(prompt + list(output.outputs[0].token_ids))
            saved[f"{number}.{place}.positions"] = np.array([position for position, _ in mine])
            saved[f"{number}.{place}.readouts"] = np.stack([row for _, row in mine])
    saved["columns"] = np.array(json.dumps({str(tap): index for tap, index in columns.items()}))
    return saved


if __name__ == "__main__":
    main()
