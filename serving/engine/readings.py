"""Run prompts through a monitored engine in this process and keep every row that its workers sent.

Run as a program, because an engine's settings and wraps belong to a whole process:
``python -m serving.engine.readings OUT.npz``. Reads from standard input a JSON object: ``policy`` (path), ``engine``
(arguments of ``vllm.LLM``), ``runs`` (each a batch of prompts, each a list of tokens), ``new_tokens``. Prefix caching
must be off: a row that was not computed is not sent.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import numpy as np

from serving.engine.launch import server_environment
from serving.engine.readouts import ATTRIBUTE, WorkerReadouts
from serving.engine.runtime import CONFIG_VARIABLE


class Recorder:
    """Looks at every step's result before the scheduler takes it in.

    Args:
        scheduler: vLLM's, in this process.
    """

    def __init__(self, scheduler: Any) -> None:
        self.modes: Counter[str] = Counter()
        self.rows: dict[str, list[tuple[int, np.ndarray]]] = {}
        self._take_in = scheduler.update_from_output
        scheduler.update_from_output = self._record

    def clear(self) -> None:
        """Forget the run before."""
        self.modes.clear()
        self.rows.clear()

    def _record(self, scheduler_output: Any, model_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens > 0:
            stats = model_output.cudagraph_stats
            self.modes[stats.runtime_mode.rpartition(".")[2] if stats is not None else "unknown"] += 1
        found: WorkerReadouts | None = getattr(model_output, ATTRIBUTE, None)
        if found is not None:
            start = 0
            for name, count in zip(found.request_ids, found.counts.tolist(), strict=True):
                for row in range(start, start + count):
                    self.rows.setdefault(name, []).append((int(found.positions[row]), found.readouts[row].copy()))
                start += count
        return self._take_in(scheduler_output, model_output)


def main() -> None:
    """Read the order, run it, write the rows."""
    order = json.load(sys.stdin)
    for name, value in server_environment().items():
        os.environ.setdefault(name, value)
    os.environ |= {CONFIG_VARIABLE: order["policy"], "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(**order["engine"])
    params = SamplingParams(max_tokens=order["new_tokens"], temperature=0.0, ignore_eos=True)
    recorder = Recorder(llm.llm_engine.engine_core.engine_core.scheduler)
    saved: dict[str, np.ndarray] = {}
    summary: list[dict[str, Any]] = []
    for number, prompts in enumerate(order["runs"]):
        recorder.clear()
        (before,) = llm.collective_rpc("telltale_status")
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        (after,) = llm.collective_rpc("telltale_status")
        fired = {tap: count - before["taps"][tap] for tap, count in after["taps"].items()}
        summary.append({"modes": dict(recorder.modes), "fired": fired, "runner": after["runner"]})
        # Internal names begin with the number that the engine gave the request.
        names = sorted(recorder.rows, key=lambda name: int(name.split("-")[0]))
        for place, (prompt, output, name) in enumerate(zip(prompts, outputs, names, strict=True)):
            saved[f"{number}.{place}.tokens"] = np.array(prompt + list(output.outputs[0].token_ids))
            saved[f"{number}.{place}.positions"] = np.array([position for position, _ in recorder.rows[name]])
            saved[f"{number}.{place}.readouts"] = np.stack([row for _, row in recorder.rows[name]])
    np.savez(sys.argv[1], summary=np.array(json.dumps(summary)), **saved)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
