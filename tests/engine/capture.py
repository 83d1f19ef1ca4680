"""Run prompts through a monitored engine in this process and keep every row that its monitor saw, computed or replayed.

Run as a program, because an engine's settings and wraps belong to a whole process:
``python -m tests.engine.capture MODEL POLICY OUT.npz``. Reads ``{"runs": [[[token, ...], ...], ...]}`` from standard
input: each run is one batch of prompts.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np

from tests.engine.recorder import Recorder

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
    recorder = Recorder(llm.llm_engine.engine_core.engine_core.scheduler)
    bank = recorder.monitor.plan.bank
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    columns = {tap: [int(bank.norm_column(tap))] for tap in bank.taps}
    for places in bank.columns.values():
        for tap, index in places.items():
            columns[tap].append(int(index[0]))
    saved: dict[str, np.ndarray] = {}
    for number, prompts in enumerate(runs):
        recorder.rows.clear()
        recorder.replayed.clear()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        saved[f"{number}.replayed"] = np.array(sum(recorder.replayed.values()))
        internal = sorted(recorder.rows, key=lambda name: int(name.split("-")[0]))
        for place, (prompt, output, name) in enumerate(zip(prompts, outputs, internal, strict=True)):
            mine = recorder.rows[name]
            saved[f"{number}.{place}.tokens"] = np.array(prompt + list(output.outputs[0].token_ids))
            saved[f"{number}.{place}.positions"] = np.array([position for position, _ in mine])
            saved[f"{number}.{place}.readouts"] = np.stack([row for _, row in mine])
    saved["columns"] = np.array(json.dumps({str(tap): index for tap, index in columns.items()}))
    return saved


if __name__ == "__main__":
    main()
