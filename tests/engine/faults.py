"""Break one thing at a time in a monitored engine of this process, and say what became of a request.

Run as a program: ``python -m tests.engine.faults MODEL POLICY``. Prints one JSON object: ``requests`` ({fault: {on_gap:
outcome}}), ``contract`` ({fault: {where: {how: {on_gap: outcome}}}}), ``canaries`` (the same as ``requests`` while a
canary fails, and after it has passed again), ``pair`` and ``resident``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from typing import Any

import numpy as np

from monitor.types import Action
from tests.support.tiny import THRESHOLD

FAULTS = ("none", "nan", "infinite", "no_readouts", "rows_missing", "wrong_width", "monitor_error", "silent_tap")
CANARY_FAULTS = ("corrupted_bank", "corrupted_bias", "silent_tap", "late", "nan", "no_readouts")
ON_GAP = ("block", "flag", "allow")
WHERE = ("prompt", "stream")
"""When a fault begins: before the first step of a request, or when some of its reply is there."""
HOW = ("whole", "streamed")
"""How its client asks for the reply."""
BEFORE = 3
"""Tokens of the reply that the engine has made when a fault in the stream begins."""
PLAIN = [100 + number for number in range(20)]
LATE_SECONDS = 2.5


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

    def picky(readouts: np.ndarray) -> np.ndarray:
        if (readouts[:, 0] > THRESHOLD).any():
            raise ZeroDivisionError("a detector that fails on one request")
        return original_score(readouts)

    def sleepy(sent: Any) -> Any:
        time.sleep(LATE_SECONDS)
        return sent

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
    taps = runner.telltale_taps
    layer = taps.module(taps.taps[0])
    tapped, weight, bias = layer.__class__, layer.telltale_weight.clone(), layer.telltale_bias.clone()
    if fault in changes:
        runner.sample_tokens = sample_with(changes[fault])
    if fault == "late":
        runner.sample_tokens = sample_with(sleepy)
    if fault == "monitor_error":
        monitor.plan.bank.score = fail
    if fault == "one_request":
        monitor.plan.bank.score = picky
    if fault == "silent_tap":
        layer.__class__ = tapped.__mro__[1]
    if fault == "corrupted_bank":
        # One weight: of a dimension in which the direction was zero.
        layer.telltale_weight[7, 0] += 0.5
    if fault == "corrupted_bias":
        layer.telltale_bias[0] += 1.0
    try:
        yield
    finally:
        runner.sample_tokens, monitor.plan.bank.score = original_sample, original_score
        layer.__class__ = tapped
        layer.telltale_weight.copy_(weight)
        layer.telltale_bias.copy_(bias)


def describe(output: Any, refusal: str) -> dict[str, Any]:
    record = output.telltale
    return {
        "finish": output.finish_reason,
        "tokens": len(output.token_ids),
        "text_is_refusal": output.text == refusal,
        "action": record.describe()["action"],
        "rule": record.describe()["rule"],
        "scored": record.scored,
        "skipped": record.skipped,
    }


class Bench:
    """An engine in this process, and the ways to ask it."""

    def __init__(self, model: str) -> None:
        from vllm import LLM, SamplingParams
        from vllm.engine.arg_utils import EngineArgs

        from serving.engine.plugin import INSTALLED

        self.llm = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=134217728, max_model_len=512)
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.monitor = core.scheduler._monitor.monitor_of(None)
        self.worker = core.model_executor.driver_worker.worker
        self.runner = self.worker.model_runner
        self.frontend = getattr(EngineArgs, INSTALLED)
        self.params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        self.once = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        self.compiled = self.monitor.plan.policies[0]
        self._sent = 0

    def set_on_gap(self, action: str) -> None:
        changed = dataclasses.replace(self.compiled, on_gap=Action(action))
        self.monitor._judge.plan = dataclasses.replace(self.monitor.plan, policies=(changed,))

    def ask(self, *prompts: list[int]) -> list[dict[str, Any]]:
        asked = [{"prompt_token_ids": tokens} for tokens in prompts]
        results = self.llm.generate(asked, self.params, use_tqdm=False)
        return [describe(result.outputs[0], self.compiled.text) for result in results]

    def follow(self, how: str, break_it: Callable[[], AbstractContextManager[None]], *, after: int) -> dict[str, Any]:
        """One request, step by step; the fault begins once so many tokens of its reply were made."""
        from vllm.sampling_params import RequestOutputKind

        params = self.params.clone()
        params.output_kind = RequestOutputKind.DELTA if how == "streamed" else RequestOutputKind.FINAL_ONLY
        self._sent += 1
        engine, name = self.llm.llm_engine, f"followed-{self._sent}"
        engine.add_request(name, {"prompt_token_ids": PLAIN}, params)
        outputs = []
        while after and self.scheduler.get_num_unfinished_requests() and self._num_made() < after:
            outputs += engine.step()
        with break_it():
            while engine.has_unfinished_requests():
                outputs += engine.step()
        last = outputs[-1].outputs[0]
        said = describe(last, self.compiled.text)
        text = "".join(output.outputs[0].text for output in outputs)
        said["tokens"] = sum(len(output.outputs[0].token_ids) for output in outputs)
        said["refusal"] = text.removesuffix(self.compiled.text).strip() != text.strip()
        said["shown"] = bool(text.removesuffix(self.compiled.text).strip())
        return said

    def _num_made(self) -> int:
        (request,) = (*self.scheduler.running, *self.scheduler.waiting)
        return int(request.num_output_tokens)

    def send_canary(self) -> dict[str, Any]:
        """As the API process does: marked by the front end, under an id of ours."""
        card = next(iter(self.monitor.plan.cards.values()))
        self._sent += 1
        request_id = f"canary-{self._sent}"
        self.frontend.begin_canary(request_id)
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(card.canary.tokens)}, self.once)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
        self.frontend.end_canary(request_id)
        status: dict[str, Any] = self.scheduler.telltale_control("canary", {})
        return status

    def resident_refusal(self) -> str:
        from serving.engine.proof import ProofError, require_resident

        try:
            require_resident(self.monitor.plan.bank, [self.worker.telltale_status()["resident"]])
        except ProofError as error:
            return str(error)
        return ""


def request_faults(bench: Bench) -> dict[str, dict[str, Any]]:
    outcomes: dict[str, dict[str, Any]] = {}
    for fault in FAULTS:
        for action in ON_GAP:
            bench.set_on_gap(action)
            with broken(fault, bench.runner, bench.monitor):
                (outcome,) = bench.ask(PLAIN)
            outcomes.setdefault(fault, {})[action] = outcome
    return outcomes


def contract(bench: Bench) -> dict[str, Any]:
    """What a client gets, by fault, where it begins, how the reply is asked for, and what the policy says."""
    found: dict[str, Any] = {}
    for fault, where, how, action in product(FAULTS, WHERE, HOW, ON_GAP):
        bench.set_on_gap(action)
        outcome = bench.follow(
            how,
            lambda fault=fault: broken(fault, bench.runner, bench.monitor),
            after=BEFORE if where == "stream" else 0,
        )
        found.setdefault(fault, {}).setdefault(where, {}).setdefault(how, {})[action] = outcome
    return found


def canary_faults(bench: Bench) -> dict[str, dict[str, Any]]:
    outcomes: dict[str, dict[str, Any]] = {"none": {"canary": bench.send_canary()}}
    before = dataclasses.asdict(bench.monitor.tally)
    bench.send_canary()
    outcomes["none"]["tally_unchanged"] = before == dataclasses.asdict(bench.monitor.tally)
    (outcomes["none"]["allow"],) = bench.ask(PLAIN)
    for fault in CANARY_FAULTS:
        found: dict[str, Any] = {}
        with broken(fault, bench.runner, bench.monitor):
            found["canary"] = bench.send_canary()
            found["resident"] = bench.resident_refusal()
        # The fault has gone, its canary is the newest: nobody may rely on the readings before one passes.
        for action in ON_GAP:
            bench.set_on_gap(action)
            (found[action],) = bench.ask(PLAIN)
        found["again"] = bench.send_canary()
        (found["after"],) = bench.ask(PLAIN)
        outcomes[fault] = found
    return outcomes


def main() -> None:
    """Inject every fault under every ``on_gap``."""
    model, policy, trigger = sys.argv[1:4]
    os.environ |= {"TELLTALE_CONFIG": policy, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    bench = Bench(model)
    found = {"requests": request_faults(bench), "resident": bench.resident_refusal()}
    bench.set_on_gap("block")
    with broken("one_request", bench.runner, bench.monitor):
        found["pair"] = bench.ask(PLAIN, [*PLAIN[:-1], int(trigger)])
    found["contract"] = contract(bench)
    found["canaries"] = canary_faults(bench)
    print("OUTCOMES " + json.dumps(found))


if __name__ == "__main__":
    main()
