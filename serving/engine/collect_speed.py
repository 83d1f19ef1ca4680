"""One side of the comparison in ``serving.bench.collect``, as a process of its own: vLLM alone, or collecting.

``python -m serving.engine.collect_speed plain|collect ORDER.json``. The order names the prompts' file, a folder for
what is collected, the taps and vLLM's arguments. Says ``ready``, then runs all prompts once for each line that comes
in, and answers with the seconds and the prompt tokens as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probes.card import Format
from probes.fit.reading.activation_manifest import TokenPositions
from probes.taps import Tap
from serving.engine.collect import Collector, CollectOrder
from serving.engine.launch import server_environment

Round = Callable[[], tuple[float, int]]
"""Runs all prompts; seconds, and tokens that were computed."""


def plain_round(order: dict[str, Any]) -> Round:
    """VLLM alone: ``LLM.generate`` with one new token, given tokens and not text."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = EngineArgs.from_cli_args(parser.parse_args(["--model", *order["arguments"]]))
    arguments.enable_prefix_caching = False
    llm = LLM.from_engine_args(arguments)
    tokenizer = llm.get_tokenizer()
    texts = [json.loads(line)["text"] for line in Path(order["prompts"]).read_text(encoding="utf-8").splitlines()]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [
        {"prompt_token_ids": tokenizer.encode(rendered, add_special_tokens=False)}
        for rendered in tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    ]
    params = SamplingParams(max_tokens=1, temperature=0.0)

    def run() -> tuple[float, int]:
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - started, sum(len(prompt["prompt_token_ids"]) for prompt in prompts)

    return run


def collect_round(order: dict[str, Any]) -> Round:
    """Everything that ``telltale collect`` does with a started engine, from the file to the finished folder."""
    collector = Collector(
        CollectOrder(
            taps=tuple(Tap.parse(tap) for tap in order["taps"]),
            text_format=Format.CHAT,
            positions=TokenPositions.ALL,
            model_id=order["model_id"],
            arguments=tuple(order["arguments"]),
            shard_bytes=order["shard_bytes"],
            shard_tokens=order["shard_tokens"],
        ),
        say=lambda text: None,
    )
    out = Path(order["out"])

    def run() -> tuple[float, int]:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        manifest = collector.collect(Path(order["prompts"]), out, progress=lambda tokens, total: None)
        return time.perf_counter() - started, manifest.tokens

    return run


def main() -> None:
    """Start, then answer until standard input ends."""
    side, path = sys.argv[1:]
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, value in server_environment().items():
        os.environ.setdefault(name, value)
    # What the engine prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = {"plain": plain_round, "collect": collect_round}[side](order)
    run()  # the collecting engine starts with its first request, and both warm up
    answers.write("ready\n")
    answers.flush()
    for _ in sys.stdin:
        seconds, tokens = run()
        answers.write(json.dumps({"seconds": seconds, "tokens": tokens}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
