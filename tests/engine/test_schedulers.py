"""The monitor in vLLM's two schedulers, driven hard: few blocks, shared prefixes, aborts, results that come late.

A scripted worker answers, so this says nothing about taps; it shows that no row is lost, counted twice or given to
another request, whatever the scheduler does and however many steps are in flight.
"""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.card import Format
from serving.engine.readouts import ATTRIBUTE, WorkerReadouts
from serving.engine.trust import EXTRA_KEY, TrustedData, seal
from tests.engine.recorder import Recorder
from tests.support.tiny import TinyModel, save_linear

pytestmark = pytest.mark.engine

BLOCK = 16
NUM_BLOCKS = 12
VOCABULARY = 40
KINDS = ("synchronous", "asynchronous", "drafts")
KIND_ROWS = {
    "synchronous": "synchronous scheduler",
    "asynchronous": "asynchronous scheduler",
    "drafts": "ngram drafts",
}
"""The kinds as docs/coverage.md calls them."""
EMA = "{kind: ema, alpha: 0.3}"
WINDOWS = (
    ("{kind: max}", 1, 8.0),
    ("{kind: rolling, window: 4}", 4, 2.0),
    ("{kind: m_of_n, count: 2, window: 5}", 5, 4.0),
)
"""Aggregates, the tokens that each looks at, and a threshold that some of the scripted replies pass."""
END = 7
"""The token that ends a reply."""
POLICY = """\
version: "1"
detectors: [{{artifact: scripted.safetensors}}]
policies:
  - name: default
    on_gap: block
    on_uncalibrated: allow
    hold_back: {hold_back}
    rules:
      - {{name: prompt, when: {{detector: scripted, stage: prompt, aggregate: {{kind: mean}}, above: {{value: 1.0e9}}}},
         do: {{action: block}}, mode: enforce}}
      - {{name: stream, when: {{detector: scripted, stage: stream, aggregate: {aggregate}, above: {{value: {above}}}}},
         do: {{action: block}}, mode: enforce}}
reserve: {{directions: 4}}
"""
NEVER = 1e9


class ScriptedWorker:
    """Computes what a worker would: readouts that depend on the token and its position, and random next tokens."""

    def __init__(self, seed: int, width: int) -> None:
        self.random = np.random.default_rng(seed)
        self.table = self.random.normal(size=(VOCABULARY, width)).astype(np.float32)
        self.tokens: dict[str, list[int]] = {}

    def row(self, token: int, position: int) -> np.ndarray:
        return self.table[token] * np.float32(1 + position % 5)

    def step(self, scheduled: Any, requests: dict[str, Any]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        # A worker's batch has an order of its own.
        names = [str(name) for name in self.random.permutation(list(scheduled.num_scheduled_tokens))]
        sampled, positions, rows = [], [], []
        for name in names:
            count, drafts = scheduled.num_scheduled_tokens[name], scheduled.scheduled_spec_decode_tokens.get(name, [])
            start = requests[name].num_computed_tokens - count
            known = self.tokens[name]
            span = range(start, start + count)
            computed = [*known[start : start + count - len(drafts)], *drafts]
            positions.extend(span)
            rows.extend(self.row(token, position) for token, position in zip(computed, span, strict=True))
            complete = start + count - len(drafts) == len(known)
            accepted = drafts[: self.random.integers(len(drafts) + 1)] if complete else []
            new = [*accepted, int(self.random.integers(VOCABULARY))] if complete else []
            known.extend(new)
            sampled.append(new)
        output = ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, sampled_token_ids=sampled)
        counts = np.array([scheduled.num_scheduled_tokens[name] for name in names], dtype=np.int64)
        setattr(output, ATTRIBUTE, WorkerReadouts(names, counts, np.array(positions, np.int64), np.stack(rows)))
        return output


class Rig:
    """A scheduler, a scripted worker, and a number of steps that are in flight."""

    def __init__(self, cls: Any, config: Any, *, seed: int, depth: int, drafts: bool) -> None:
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        cache = KVCacheConfig(NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        self.scheduler = cls(config, cache, StructuredOutputManager(config), BLOCK, log_stats=False)
        self.recorder = Recorder(self.scheduler)
        self.worker = ScriptedWorker(seed, self.recorder.monitor.plan.bank.width)
        self.depth, self.drafts = depth, drafts
        self.flying: deque[tuple[Any, Any]] = deque()
        self.said: dict[str, list[int]] = {}
        from vllm.utils.hashing import sha256

        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def submit(self, name: str, tokens: list[int], max_tokens: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        prompt = PromptMap((Run(Role.USER, len(tokens)),), stream_from=len(tokens))
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=[END],
            extra_args={EXTRA_KEY: seal(TrustedData(None, Format.CHAT, prompt), name)},
        )
        params.update_from_generation_config({}, eos_token_id=None)
        self.worker.tokens[name] = list(tokens)
        self.said[name] = []
        self.scheduler.add_request(Request(name, tokens, params, None, block_hasher=self._hasher))

    def tick(self) -> None:
        """Schedule a step; take in the oldest result once so many are in flight."""
        step = self.scheduler.schedule()
        if step.total_num_scheduled_tokens:
            self.flying.append((step, self.worker.step(step, self.scheduler.requests)))
        if self.flying and (len(self.flying) > self.depth or not step.total_num_scheduled_tokens):
            self._land()

    def _land(self) -> None:
        from vllm.v1.outputs import DraftTokenIds

        outputs = self.scheduler.update_from_output(*self.flying.popleft())
        for client in outputs.values():
            for output in client.outputs:
                if output.request_id in self.said:
                    self.said[output.request_id].extend(output.new_token_ids)
        running = [request.request_id for request in self.scheduler.running]
        if self.drafts and running:
            guesses = self.worker.random.integers(VOCABULARY, size=(len(running), 3)).tolist()
            self.scheduler.update_draft_token_ids(DraftTokenIds(running, guesses))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def busy(self) -> bool:
        return bool(self.flying) or self.scheduler.has_unfinished_requests()


@pytest.fixture
def rig_of(tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from serving.engine import runtime
    from serving.engine.scheduler import TelltaleAsyncScheduler, TelltaleScheduler

    save_linear(tmp_path / "scripted.safetensors", tiny.path, name="scripted", direction=np.eye(128)[1], skip_first=1)
    monkeypatch.setenv("TELLTALE_CONFIG", str(tmp_path / "policy.yaml"))
    monkeypatch.setenv("TELLTALE_KEY", "0" * 64)

    def make(kind: str, seed: int, *, hold_back: int, aggregate: str = EMA, above: float = NEVER) -> Rig:
        (tmp_path / "policy.yaml").write_text(POLICY.format(hold_back=hold_back, aggregate=aggregate, above=above))
        runtime._deploy.cache_clear()
        drafts = kind == "drafts"
        arguments = EngineArgs(
            model=str(tiny.path),
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=48,
            speculative_config={"method": "ngram", "num_speculative_tokens": 3} if drafts else None,
        )
        config = arguments.create_engine_config()
        config.cache_config.block_size = BLOCK
        cls, depth = (TelltaleAsyncScheduler, 1) if kind == "asynchronous" else (TelltaleScheduler, 0)
        return Rig(cls, config, seed=seed, depth=depth, drafts=drafts)

    return make


def run_crowd(rig: Rig, seed: int) -> set[str]:
    """Many requests in a short time, some with a common prefix, some aborted: their names are returned."""
    random = np.random.default_rng(100 + seed)
    shared = random.integers(VOCABULARY, size=3 * BLOCK).tolist()
    aborted = set()
    for number in range(40):
        own = random.integers(VOCABULARY, size=random.integers(1, 2 * BLOCK)).tolist()
        kept = int(random.integers(0, len(shared) + 1)) if random.random() < 0.6 else 0
        rig.submit(f"{number}-aaaaaaaa", shared[:kept] + own, int(random.integers(1, 40)))
        for _ in range(random.integers(0, 4)):
            rig.tick()
        live = list(rig.scheduler.requests)
        if live and random.random() < 0.2:
            victim = str(random.choice(live))
            aborted.add(victim)
            rig.abort(victim)
    while rig.busy():
        rig.tick()
    return aborted


@pytest.mark.covers(KIND_ROWS, "every position accounted for")
@pytest.mark.covers(KIND_ROWS, "statistics equal batch")
@pytest.mark.covers(["preemption", "warm prefix cache", "abort"], "every position accounted for")
@pytest.mark.covers(["preemption", "warm prefix cache", "abort"], "statistics equal batch")
@pytest.mark.covers(["preemption", "warm prefix cache"], "it really happens")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hold_back", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_accounted_for(rig_of: Any, kind: str, hold_back: int, seed: int) -> None:
    rig = rig_of(kind, seed, hold_back=hold_back)
    aborted = run_crowd(rig, seed)
    check_accounts(rig, aborted)
    ended, events = rig.recorder.ended, rig.recorder.events
    assert len(ended) == 40
    assert events["preemptions"] > 0
    assert rig.recorder.replayed.total() > 0
    if kind == "drafts":
        assert events["accepted"] > 0
        assert events["rejected"] > 0


@pytest.mark.covers(KIND_ROWS, "no token leaks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window[0].strip("{}"))
def test_hold_back_of_a_window_leaks_nothing_of_it(rig_of: Any, kind: str, window: tuple[str, int, float]) -> None:
    """What fired the rule is a window of tokens; held back by its length, none of them is ever shown."""
    aggregate, size, above = window
    leaked = {
        hold_back: leaked_tokens(rig_of(kind, 5, hold_back=hold_back, aggregate=aggregate, above=above), size)
        for hold_back in {0, size - 1, size, size + 3}
    }
    assert leaked[size] == leaked[size + 3] == 0
    # One less lets out the first token of each window, nothing all of it: the count does count.
    assert 0 < leaked[size - 1] <= leaked[0]


def leaked_tokens(rig: Rig, window: int) -> int:
    """Tokens that were shown although they belong to the newest ``window`` when their request was blocked."""
    run_crowd(rig, 5)
    leaked = 0
    blocked = [item for item in rig.recorder.ended.values() if item.request.rule == "stream"]
    assert len(blocked) > 5
    for ended in blocked:
        first = ended.coverage.positions - window
        shown_up_to = ended.request.num_prompt + len(rig.said[ended.request.request_id])
        leaked += max(0, shown_up_to - max(first, ended.request.num_prompt))
    return leaked


def check_accounts(rig: Rig, aborted: set[str]) -> None:
    monitor = rig.recorder.monitor
    reasons: Counter[str] = Counter()
    for name, ended in rig.recorder.ended.items():
        coverage, prompt = ended.coverage, ended.request.num_prompt
        reasons.update(coverage.skipped())
        assert not coverage.gaps
        assert coverage.scored + coverage.sink + coverage.final == coverage.positions
        seen = coverage.scored + coverage.sink
        truth = rig.worker.tokens[name]
        if name not in aborted:
            reply = rig.said[name]
            assert reply == truth[prompt : prompt + len(reply)]
            assert coverage.positions == prompt + len(reply)
            assert seen == coverage.positions - 1
        rows = np.stack([rig.worker.row(truth[position], position) for position in range(seen)]) if seen else None
        for number, check in enumerate(monitor.plan.checks):
            expected = -np.inf
            if rows is not None:
                scores = monitor.plan.bank.score(rows)
                of_stage = slice(1, min(prompt, seen)) if check.stage.value == "prompt" else slice(max(prompt, 1), seen)
                if len(scores[of_stage]):
                    state = check.aggregate.new_state(1, 1)
                    running = check.aggregate.update(state, scores[of_stage][:, None, :1])
                    expected = running[-1, 0, 0] if check.stage.value == "prompt" else running.max()
            assert ended.statistics[number] == pytest.approx(expected, abs=1e-9)
    assert set(reasons) <= {"sink", "final"}
