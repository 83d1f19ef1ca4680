"""Run batches of requests through steered engines of this process, and write down what each request got.

Run as a program: ``python -m tests.engine.steered MODEL OUT.json``, with a JSON list on standard input. Each entry has

``policy``
    its path.
``engine``
    arguments of ``vllm.LLM``.
``runs``
    each a batch of prompts, each a list of tokens; or ``{"follow": [run, number], "more": tokens}``, an earlier prompt
    with its reply and more behind it.
``new_tokens``
    of each reply.
``choices``
    of each prompt, run by run.
``asked``
    what each prompt asks for, run by run, or empty.
``operators``
    a folder with files of steering operators, or empty.
``words``
    the only tokens that a run may say; the last of them is looked for among rejected drafts; its prompts count as
    chats, whose replies alone are streams.
``broken``
    whether the steered layer is made to forget that it is one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from typing import Any

import probes.steering
from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.card import Format
from serving.origin import Origin, enter_origin, leave_origin


def run(model: str, entry: dict[str, Any]) -> dict[str, Any]:
    """One engine, and all its batches."""
    os.environ["TELLTALE_CONFIG"] = entry["policy"]
    if entry["operators"]:
        probes.steering.__path__.append(entry["operators"])
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from serving.engine.plugin import INSTALLED

    frontend = getattr(EngineArgs, INSTALLED, None)
    if frontend is not None:
        frontend._deployment = None  # a server has one policy for its life, this process has several

    settings = {"enforce_eager": True, "kv_cache_memory_bytes": 134217728, "max_model_len": 512, **entry["engine"]}
    llm = LLM(model, dtype="float32", max_num_seqs=16, seed=0, **settings)
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    if entry["broken"]:
        for layer in core.model_executor.driver_worker.worker.model_runner.telltale_taps.stack.layers.values():
            if type(layer).__name__.startswith("Steered"):
                layer.__class__ = type(layer).__mro__[1]
    events: Counter[str] = Counter()
    preempt = scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> Any:
        events["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = count
    update = scheduler.update_from_output

    def look(step: Any, output: Any) -> Any:
        for request_id, drafts in step.scheduled_spec_decode_tokens.items():
            kept = len(output.sampled_token_ids[output.req_id_to_index[request_id]]) - 1
            told = list(scheduler.requests[request_id].output_token_ids)
            # Rejected before it was ever said.
            events["rejected"] += entry["words"][-1] in drafts[kept:] and entry["words"][-1] not in told
            events["accepted"] += kept
        return update(step, output)

    scheduler.update_from_output = look
    runs = []
    for wanted, choices in zip(entry["runs"], entry["choices"], strict=True):
        batch = [_prompt(prompt, runs) for prompt in wanted]
        # Of several choices vLLM wants a temperature; with one candidate it changes nothing.
        choice = {"temperature": 0.0} if choices == 1 else {"n": choices, "top_k": 1}
        said = {"allowed_token_ids": entry["words"]} if entry["words"] else {"logprobs": 5}
        asked = entry["asked"][len(runs)] if entry["asked"] else [{}] * len(batch)
        params = [
            SamplingParams(max_tokens=entry["new_tokens"], ignore_eos=True, extra_args=extra, **said, **choice)
            for extra in asked
        ]
        origin = Origin(Format.CHAT if entry["words"] else Format.RAW)
        for tokens in batch:
            origin.note(tokens, PromptMap((Run(Role.USER, len(tokens)),), stream_from=len(tokens)))
        token = enter_origin(origin)
        outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in batch], params, use_tqdm=False)
        leave_origin(token)
        runs.append(
            [
                {
                    "prompt": tokens,
                    "tokens": list(output.outputs[0].token_ids),
                    "logprobs": [
                        {str(token): found.logprob for token, found in step.items()}
                        for step in output.outputs[0].logprobs or ()
                    ],
                    "telltale": output.outputs[0].telltale.describe(),
                    "choices": [list(choice.token_ids) for choice in output.outputs],
                    "steered": [choice.telltale.describe().get("steered") for choice in output.outputs],
                    "cached": output.num_cached_tokens,
                }
                for tokens, output in zip(batch, outputs, strict=True)
            ]
        )
    llm.llm_engine.engine_core.shutdown()
    return {"runs": runs, "events": dict(events)}


def _prompt(wanted: Any, runs: list[Any]) -> list[int]:
    if isinstance(wanted, list):
        return wanted
    run, number = wanted["follow"]
    earlier = runs[run][number]
    return [*earlier["prompt"], *earlier["tokens"], *wanted["more"]]


def main() -> None:
    """Run the entries, one engine after the other."""
    model, out = sys.argv[1:]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    found = []
    for entry in json.load(sys.stdin):
        found.append(run(model, entry))
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform

        cleanup_dist_env_and_memory()
        # Its work is done once per process, and its second run trips over modules that were imported since.
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore[method-assign]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
