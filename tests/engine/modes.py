"""Run the same requests through monitored engines in many modes, and write down what each monitor saw.

Run as a program, because an engine's settings and wraps belong to a whole process:
``python -m tests.engine.modes MODEL POLICY OUT.json MODE [MODE ...]``. Modes of one process (without workers of their
own) can be run after each other; each gets an engine of its own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.recorder import Recorder

NEW_TOKENS = 24
LENGTHS = (5, 40, 150, 300)
BLOCK = 128
"""Tokens in a KV block of the CPU build."""
_BLOCK_BYTES = 2 * 2 * 2 * 32 * 4 * BLOCK  # keys and values, layers, heads, dimensions, float32

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"enable_prefix_caching": False, "max_num_batched_tokens": 2048},
    "chunked": {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
    "cold": {"max_num_batched_tokens": 256},
    "preempted": {"kv_cache_memory_bytes": 6 * _BLOCK_BYTES, "max_model_len": 384, "max_num_batched_tokens": 512},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 2,
        },
        "max_num_batched_tokens": 256,
    },
    "async_base": {"max_num_batched_tokens": 256},
    "tensor_parallel": {"tensor_parallel_size": 2, "max_num_batched_tokens": 256},
    "pipeline_parallel": {"pipeline_parallel_size": 2, "max_num_batched_tokens": 256},
    "pipeline_compiled": {"pipeline_parallel_size": 2, "max_num_batched_tokens": 256, "enforce_eager": False},
    "compiled": {"max_num_batched_tokens": 256, "enforce_eager": False},
}
_THREADS = {"tensor_parallel": "0|1", "pipeline_parallel": "0|1", "pipeline_compiled": "0|1"}


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random tokens; the two long ones share their first two blocks' beginning."""
    generator = np.random.default_rng(5)
    made: list[list[int]] = [generator.integers(1000, 40000, size=length).tolist() for length in lengths]
    if len(made) > 1:
        made[-1][: len(made[-2]) - 10] = made[-2][:-10]
    return made


def run_mode(mode: str, model: str) -> dict[str, Any]:
    """One engine: a batch of greedy requests twice, then special requests."""
    from vllm import LLM, SamplingParams

    settings = {"enforce_eager": True, "kv_cache_memory_bytes": 134217728, "max_model_len": 1024, **SETTINGS[mode]}
    llm = LLM(model, dtype="float32", max_num_seqs=16, seed=0, **settings)
    engine = llm.llm_engine
    recorder = Recorder(engine.engine_core.engine_core.scheduler)
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    special: dict[str, tuple[list[int], SamplingParams]] = {
        "one_token": (prompts()[1], SamplingParams(max_tokens=1, temperature=0.0)),
        "prompt_logprobs": (prompts()[2], SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=1, logprobs=1)),
        # Three words are so few that drafts from what was said before are now accepted and now rejected.
        "few_words": (
            prompts()[0],
            SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, allowed_token_ids=[1200, 1300, 1400]),
        ),
        "three_choices": (prompts()[1], SamplingParams(max_tokens=8, temperature=1.0, n=3, ignore_eos=True)),
    }
    results: dict[str, list[dict[str, Any]]] = {}

    def generate(name: str, batch: list[list[int]], params: SamplingParams) -> None:
        before = set(recorder.ended)
        outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in batch], params, use_tqdm=False)
        fresh = [key for key in recorder.ended if key not in before]
        entries = [(tokens, choice) for tokens, output in zip(batch, outputs, strict=True) for choice in output.outputs]
        # Internal ids count up in the order of the prompts; children carry their number in front.
        fresh.sort(key=lambda key: _order(key, params.n))
        results[name] = []
        for key, (tokens, choice) in zip(fresh, entries, strict=True):
            described = choice.telltale.describe()
            results[name].append(
                {
                    **recorder.summary(key),
                    "tokens": tokens + list(choice.token_ids),
                    "prompt": len(tokens),
                    "shown": [described["detectors"][0]["scored"], described["detectors"][0]["skipped"]],
                }
            )

    generate("batch", prompts(), greedy)
    generate("again", prompts(), greedy)
    # Each fits into one block and grows into a second one: with few blocks, some are preempted and computed again.
    generate("crowd", prompts((120, 121, 122, 123)), greedy)
    for name, (tokens, params) in special.items():
        generate(name, [tokens], params)
    results["aborted"] = [_aborted(engine, recorder, prompts()[1], greedy)]
    columns = {str(tap): int(recorder.monitor.plan.bank.norm_column(tap)) for tap in recorder.monitor.plan.bank.taps}
    bank = recorder.monitor.plan.bank
    read = {name: {str(tap): index.tolist() for tap, index in places.items()} for name, places in bank.columns.items()}
    checks = [(check.detector, check.stage.value) for check in recorder.monitor.plan.checks]
    found = {
        "results": results,
        "events": dict(recorder.events),
        "norms": columns,
        "columns": read,
        "checks": checks,
        "scheduler": [cls.__name__ for cls in type(engine.engine_core.engine_core.scheduler).__mro__],
    }
    engine.engine_core.shutdown()
    return found


def _order(key: str, choices: int) -> tuple[int, int]:
    if choices == 1:
        return int(key.split("-", maxsplit=1)[0]), 0
    child, parent = key.split("_", 1)
    return int(parent.split("-")[0]), int(child)


def _aborted(engine: Any, recorder: Recorder, tokens: list[int], params: Any) -> dict[str, Any]:
    """A request that is cut off from outside after some steps."""
    before = set(recorder.ended)
    engine.add_request("cut-off", {"prompt_token_ids": tokens}, params)
    for _ in range(6):
        engine.step()
    engine.abort_request(["cut-off"])
    while engine.has_unfinished_requests():
        engine.step()
    (key,) = [key for key in recorder.ended if key not in before]
    return {**recorder.summary(key), "tokens": tokens, "prompt": len(tokens)}


def main() -> None:
    """Run the modes."""
    model, policy, out, *modes = sys.argv[1:]
    os.environ |= {"TELLTALE_CONFIG": policy, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    found = {}
    for mode in modes:
        if mode in _THREADS:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _THREADS[mode]
        if mode == "async_base":
            from serving.engine import plugin

            plugin._SCHEDULERS = {False: plugin._SCHEDULERS[True], True: plugin._SCHEDULERS[True]}
        found[mode] = run_mode(mode, model)
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        cleanup_dist_env_and_memory()
        # Its work is done once per process, and its second run trips over modules that were imported since.
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore[method-assign]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
