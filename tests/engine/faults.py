"""Break one thing at a time in a monitored engine of this process, and say what became of a request.

Run as a program: ``python -m tests.engine.faults MODEL POLICY``. Prints ``{fault: {on_gap: outcome}}`` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

FAULTS = ("none", "nan", "infinite", "no_readouts", "rows_missing", "wrong_width", "monitor_error")
ON_GAP = ("block", "flag", "allow")


@contextmanager
def broken(fault: str, runner: Any, monitor: Any) -> Iterator[None]:
    """Inject a fault where it would really happen: in what the worker sends, or in the monitor's own code."""
    original_sample, original_score = runner.sample_tokens, monitor.plan.bank.score

    def sample_with(change: Callable[[Any], Any]) -> Callable[..., Any]:
        def sample(*args: Any, **kwargs: Any) -> Any:
            output = original_sample(*args, **kwargs)
            if getattr(output, "telltale", None) is not None:
                output.telltale = change(output.telltale)
            return output

        return sample

    def poison(value: float) -> Callable[[Any], Any]:
        def change(sent: Any) -> Any:
            readouts = sent.readouts.copy()
            readouts[-1, 0] = value
            return dataclasses.replace(sent, readouts=readouts)

        return change

    def fail(readouts: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("a detector that fails")

    changes: dict[str, Callable[[Any], Any]] = {
        "nan": poison(float("nan")),
        "infinite": poison(float("inf")),
        "no_readouts": lambda sent: None,
        "rows_missing": lambda sent: dataclasses.replace(
            sent,
            counts=sent.counts - 1,
            positions=sent.positions[:-1],
            readouts=sent.readouts[:-1],
        ),
        "wrong_width": lambda sent: dataclasses.replace(sent, readouts=sent.readouts[:, :-1]),
    }
    if fault in changes:
        runner.sample_tokens = sample_with(changes[fault])
    if fault == "monitor_error":
        monitor.plan.bank.score = fail
    try:
        yield
    finally:
        runner.sample_tokens, monitor.plan.bank.score = original_sample, original_score


def main() -> None:
    """Inject every fault under every ``on_gap``."""
    model, policy = sys.argv[1:3]
    os.environ |= {"TELLTALE_CONFIG": policy, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=134217728, max_model_len=512)
    core = llm.llm_engine.engine_core.engine_core
    monitor = core.scheduler._monitor
    runner = core.model_executor.driver_worker.worker.model_runner
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    compiled = monitor.plan.policies[0]
    from monitor.types import Action

    outcomes: dict[str, dict[str, Any]] = {}
    for fault in FAULTS:
        for action in ON_GAP:
            changed = dataclasses.replace(compiled, on_gap=Action(action))
            monitor.plan = dataclasses.replace(monitor.plan, policies=(changed,))
            prompt = {"prompt_token_ids": [100 + number for number in range(20)]}
            with broken(fault, runner, monitor):
                (result,) = llm.generate([prompt], params, use_tqdm=False)
            output = result.outputs[0]
            record = output.telltale
            outcomes.setdefault(fault, {})[action] = {
                "finish": output.finish_reason,
                "tokens": len(output.token_ids),
                "text_is_refusal": output.text == compiled.text,
                "action": record.describe()["action"],
                "rule": record.describe()["rule"],
                "scored": record.scored,
                "skipped": record.skipped,
            }
    print("OUTCOMES " + json.dumps(outcomes))


if __name__ == "__main__":
    main()
