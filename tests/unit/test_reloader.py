"""How a policy comes in, step by step, over scripted engines: whatever goes wrong on the way changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from monitor.canary import CanaryFailure
from monitor.config import CanarySettings
from monitor.generations import Generations
from monitor.history import HistoryError, Reload
from monitor.types import ReloadOutcome, ReloadSource
from probes.artifact import save_artifact
from probes.card import Canary, Card
from probes.errors import TelltaleError
from probes.taps import Tap
from serving.deployment import Deployment
from serving.engine.canary import Canaries
from serving.engine.door import Door
from serving.engine.frontend import Frontend
from serving.engine.heartbeats import Heartbeats
from serving.engine.readouts import WorkerReadouts
from serving.engine.reloader import Listeners, Reloader
from serving.engine.status import WorkerStatus
from serving.engine.steerbook import SteerBook
from serving.engine.taps import TapSet, tap_buffers
from tests.unit.artifacts import D_MODEL, calibration, make_card, unit_artifact
from tests.unit.test_redeploy import HEAD, folder, started, store, text

__all__ = ["folder"]
VOCAB = 50
TOKENS = (3, 9, 17, 21, 30, 31, 40, 2)
STREAMS = np.random.default_rng(5).integers(-4, 5, (VOCAB, D_MODEL)).astype(np.float32)
"""What the layer of the scripted model returns for each token."""


class Worker(WorkerStatus):
    """One worker with one tap; ``damage`` is added to whatever is written."""

    def __init__(self, deployment: Deployment) -> None:
        (matrix,) = deployment.plan.bank.matrices
        module = nn.Module()
        for name, buffer in tap_buffers(matrix, max_rows=16, device=torch.device("cpu")).items():
            module.register_buffer(name, buffer, persistent=False)
        stack: Any = SimpleNamespace()
        self.module, self.damage = module, 0.0
        taps = TapSet(deployment.plan.bank, {matrix.tap: module}, stack, torch.device("cpu"))
        self.model_runner = SimpleNamespace(telltale_taps=taps)

    def telltale_write(self, columns: Any) -> dict[str, list[str]]:
        damaged = [
            [tap, places, (np.frombuffer(weight, dtype=np.float32) + np.float32(self.damage)).tobytes(), bias]
            for tap, places, weight, bias in columns
        ]
        return super().telltale_write(damaged)

    def read(self, tokens: tuple[int, ...]) -> np.ndarray:
        stream = STREAMS[list(tokens)]
        weight, bias = (self.module.get_buffer(f"telltale_{name}").numpy() for name in ("weight", "bias"))
        return np.column_stack([stream @ weight + bias, (stream**2).sum(axis=1)]).astype(np.float32)


class Rank:
    """One engine: its door and its worker."""

    def __init__(self, deployment: Deployment) -> None:
        plan = deployment.plan
        self.worker = Worker(deployment)
        self.generations = Generations(plan)
        self.heartbeats = Heartbeats(plan, CanarySettings(), vocab=VOCAB)
        book = SteerBook(plan, block_size=4)
        self.door = Door(deployment, self.generations, self.heartbeats, None, book)
        self.broken: set[str] = set()

    def utility(self, method: str, *args: Any) -> Any:
        if method == "collective_rpc":
            return [getattr(self.worker, args[0])(*args[2])]
        if args[0] in self.broken:
            raise RuntimeError(f"{args[0]} is broken")
        return self.door.answer(args[0], args[1])

    def canary(self, request_id: str, tokens: tuple[int, ...], plan: str) -> None:
        self.heartbeats.admit(request_id, tokens, plan)
        self.heartbeats.scheduled([request_id])
        count = np.array([len(tokens)])
        readouts = WorkerReadouts([request_id], count, np.arange(len(tokens)), self.worker.read(tokens))
        self.heartbeats.take(readouts)
        self.heartbeats.finish(request_id, aborted=False)


class Case:
    """A server of two ranks whose policy is changed."""

    def __init__(self, deployment: Deployment) -> None:
        self.ranks = [Rank(deployment), Rank(deployment)]
        self.frontend = Frontend()
        self.frontend.configure(deployment)
        self.parallel = SimpleNamespace(_api_process_count=1)
        config = SimpleNamespace(
            parallel_config=self.parallel,
            scheduler_config=SimpleNamespace(policy="fcfs"),
            model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB),
        )
        core = SimpleNamespace(call_utility_all_async=self.utility)
        self.engine = SimpleNamespace(vllm_config=config, engine_core=core, generate=self.generate)
        self.canaries = Canaries(self.engine, self.frontend)
        self.adopted: list[Deployment] = []
        self.refused = ""
        self.reloader = Reloader(self.engine, self.frontend, self.canaries, Listeners(self.check, self.adopted.append))

    def check(self, deployment: Deployment) -> None:
        if self.refused:
            raise TelltaleError(self.refused)

    async def utility(self, method: str, *args: Any) -> list[Any]:
        return [rank.utility(method, *args) for rank in self.ranks]

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, priority: int, data_parallel_rank: int | None
    ) -> AsyncIterator[None]:
        plan = self.frontend._canaries[request_id]
        self.ranks[data_parallel_rank or 0].canary(request_id, tuple(prompt["prompt_token_ids"]), plan)
        yield None

    def reload(self, content: str) -> Reload:
        return asyncio.run(self.reloader.reload(content, ReloadSource.API))

    def held(self) -> list[set[str]]:
        return [set(rank.generations.plans) for rank in self.ranks]

    @property
    def running(self) -> str:
        return self.frontend.deployment.plan.digest


def proved(folder: Path, name: str, dimension: int, *, off: float = 0.0) -> None:
    """A detector whose card states what the scripted model's layer gives, or something else."""
    made = make_card(name, calibrations=[calibration()])
    scores = tuple(float(value) + off for value in STREAMS[list(TOKENS), dimension][made.skip_first :])
    canary = Canary(tokens=TOKENS, scores=scores, tolerance=0.01, reference="the scripted model")
    card: Card = made.model_copy(update={"canary": canary})
    save_artifact(folder / f"{name}.safetensors", card, unit_artifact(card, dimension).tensors)


@pytest.fixture
def case(folder: Path) -> Case:
    proved(folder, "other", 1)
    proved(folder, "third", 2)
    return Case(started(folder))


def require_untouched(case: Case, digest: str) -> None:
    assert case.running == digest
    assert case.held() == [{digest}, {digest}]
    assert case.adopted == []
    assert [rank.generations.plan.digest for rank in case.ranks] == [digest, digest]
    assert [rank.heartbeats.status()["failure"] for rank in case.ranks] == [None, None]
    assert case.reloader.history.running.digest == digest


def test_a_new_direction_comes_in_on_all_ranks_and_what_ran_is_kept_for_a_while(case: Case) -> None:
    before = case.running
    entry = case.reload(text("other", names=("harm", "other")))
    assert (entry.outcome, entry.before, entry.message) == (ReloadOutcome.APPLIED, before, "")
    assert case.running == entry.digest
    assert case.held() == [{before, entry.digest}] * 2
    assert [rank.generations.plan.digest for rank in case.ranks] == [entry.digest] * 2
    plan = case.frontend.deployment.plan
    for rank in case.ranks:
        scores = plan.bank.score(rank.worker.read(TOKENS))
        np.testing.assert_array_equal(scores, STREAMS[list(TOKENS)][:, :2])
    assert [found.plan.digest for found in case.adopted] == [entry.digest]
    assert case.canaries.failure is None
    assert [prompt.tokens for prompt in case.canaries.prompts] == [TOKENS]
    assert asyncio.run(case.canaries.round()) is None


def test_a_canary_that_fails_on_one_rank_keeps_it_out_of_all(case: Case, folder: Path) -> None:
    before = case.running
    proved(folder, "other", 1, off=1.0)
    wanted = text("other", names=("harm", "other"))
    entry = case.reload(wanted)
    assert (entry.outcome, CanaryFailure.WRONG_SCORES.value in entry.message) == (ReloadOutcome.FAILED, True)
    assert not any(character.isdigit() for character in entry.message)  # scores are for the log
    require_untouched(case, before)
    proved(folder, "other", 1)
    assert case.reload(wanted).outcome is ReloadOutcome.APPLIED


@pytest.mark.parametrize("step", ["prepare", "prepared", "admit", "commit"])
def test_an_engine_that_fails_in_any_step_leaves_what_ran(case: Case, step: str) -> None:
    before = case.running
    case.ranks[1].broken = {step}
    entry = case.reload(text("other", names=("harm", "other")))
    assert (entry.outcome, f"({step})" in entry.message) == (ReloadOutcome.FAILED, True)
    case.ranks[1].broken = set()
    if step == "commit":  # the other rank had put it in force already, and takes it back
        assert case.running == before
        assert [rank.generations.plan.digest for rank in case.ranks] == [before, before]
        assert asyncio.run(case.canaries.round()) is None
        assert case.reload(text("other", names=("harm", "other"))).outcome is ReloadOutcome.APPLIED
        return
    require_untouched(case, before)
    assert case.reload(text("third", names=("harm", "third"))).outcome is ReloadOutcome.APPLIED


def test_a_worker_that_holds_other_numbers_is_noticed(case: Case) -> None:
    before = case.running
    case.ranks[1].worker.damage = 0.5
    entry = case.reload(text("other", names=("harm", "other")))
    assert (entry.outcome, "other numbers at resid_post.0" in entry.message) == (ReloadOutcome.FAILED, True)
    require_untouched(case, before)


def test_what_is_refused_never_reaches_an_engine(case: Case) -> None:
    before = case.running
    for rank in case.ranks:
        rank.broken = {"prepare", "admit", "commit", "discard"}
    assert case.reload("nonsense").outcome is ReloadOutcome.REFUSED
    entry = case.reload(text(head="reserve: {directions: 3}\n"))
    assert (entry.outcome, entry.setting) == (ReloadOutcome.RESTART_NEEDED, "reserve")
    case.refused = "the template differs"
    assert case.reload(text(action="flag")).message == "the template differs"
    case.refused = ""
    case.parallel._api_process_count = 2
    entry = case.reload(text(action="flag"))
    assert (entry.outcome, entry.setting) == (ReloadOutcome.RESTART_NEEDED, "--api-server-count")
    case.parallel._api_process_count = 1
    assert case.reload(f"# a comment\n{text()}").outcome is ReloadOutcome.UNCHANGED
    require_untouched(case, before)
    outcomes = [entry.outcome for entry in case.reloader.history]
    assert [outcomes.count(outcome) for outcome in (ReloadOutcome.REFUSED, ReloadOutcome.RESTART_NEEDED)] == [2, 2]


def test_back_and_there_again_and_not_to_what_has_changed(case: Case, folder: Path) -> None:
    first = case.running
    second = case.reload(text("other", names=("harm", "other")))
    back = asyncio.run(case.reloader.roll_back())
    assert (back.outcome, back.source, back.digest) == (ReloadOutcome.APPLIED, ReloadSource.ROLLBACK, first)
    there = asyncio.run(case.reloader.roll_back(second.number))
    assert (there.outcome, case.running) == (ReloadOutcome.APPLIED, second.digest)
    with pytest.raises(HistoryError):
        asyncio.run(case.reloader.roll_back(99))
    store(folder, "harm", dimension=1)
    entry = asyncio.run(case.reloader.roll_back(0))
    assert (entry.outcome, "an artifact that it names has changed" in entry.message) == (ReloadOutcome.FAILED, True)
    assert case.running == second.digest


def test_who_is_let_in_changes_without_the_engines(case: Case) -> None:
    before = case.running
    for rank in case.ranks:
        rank.broken = {"prepare", "admit", "commit", "discard"}
    key = f"access: {{keys: [{{name: ops, key_sha256: {'a' * 64}, scopes: [admin]}}]}}\n"
    entry = case.reload(text(head=HEAD + key))
    assert (entry.outcome, entry.digest, case.running) == (ReloadOutcome.APPLIED, before, before)
    assert [found.file.config.access.keys[0].name for found in case.adopted] == ["ops"]
    assert asyncio.run(case.reloader.roll_back()).outcome is ReloadOutcome.APPLIED
    assert case.adopted[-1].file.config.access.keys == ()


def test_a_file_that_is_gone_is_refused(case: Case, folder: Path) -> None:
    before = case.running
    (folder / "running.yaml").unlink()
    entry = asyncio.run(case.reloader.reload_file(ReloadSource.SIGNAL))
    assert (entry.outcome, "cannot be read" in entry.message) == (ReloadOutcome.REFUSED, True)
    require_untouched(case, before)


def test_a_new_direction_takes_the_column_of_one_that_nobody_reads_any_more(case: Case) -> None:
    case.reload(text("other", names=("harm", "other")))
    case.reload(text("harm"))
    wanted = text("third", names=("harm", "third"))
    assert case.reload(wanted).outcome is ReloadOutcome.NO_ROOM  # the plan with "other" is kept for late requests
    for rank in case.ranks:
        rank.generations._clock = lambda: float("inf")
    entry = case.reload(wanted)
    assert entry.outcome is ReloadOutcome.APPLIED
    assert case.frontend.deployment.plan.bank.columns["third"][Tap(0)].tolist() == [1]
    scores = case.frontend.deployment.plan.bank.score(case.ranks[1].worker.read(TOKENS))
    np.testing.assert_array_equal(scores, STREAMS[list(TOKENS)][:, [0, 2]])


def test_who_asked_may_leave_and_the_policy_comes_in_all_the_same(case: Case) -> None:
    async def leave() -> None:
        asked = asyncio.ensure_future(case.reloader.reload(text("other", names=("harm", "other")), ReloadSource.API))
        while len(case.held()[0]) == 1:  # not before an engine has it
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.gather(*case.reloader._tasks)

    asyncio.run(leave())
    assert case.reloader.history.running.outcome is ReloadOutcome.APPLIED
    assert case.reloader.history.running.number == 1
    assert {rank.generations.plan.digest for rank in case.ranks} == {case.running}
