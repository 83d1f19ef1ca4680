"""What a running server can take over, what needs a restart, what has to wait; and what is said in each case."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from monitor.history import History, HistoryError, Reload
from monitor.policy import Plan, compile_plan
from monitor.reload import RestartNeededError, fitted, fixed_settings
from monitor.types import ReloadOutcome, ReloadSource
from monitor.yaml_file import PolicyError, read_policy_file
from probes.artifact import ArtifactError, save_artifact
from probes.bank import BankError
from probes.card import Stage
from probes.columns import Room, union
from probes.taps import Tap
from serving.deployment import Deployment, check_policy, load_artifacts, load_steers
from serving.redeploy import NoFreeColumnError, redeploy
from tests.unit.artifacts import (
    D_MODEL,
    NUM_LAYERS,
    calibration,
    make_card,
    model_ref,
    policy_text,
    rule,
    unit_artifact,
)
from tests.unit.test_steers import CALM, STEER, do, saved

HEAD = "reserve: {directions: 2}\n"


def store(folder: Path, name: str, *, layer: int = 0, dimension: int = 0, **card: Any) -> None:
    made = make_card(
        name, layers=(layer,), calibrations=[calibration(), calibration(Stage.STREAM)], **{"model": model_ref(), **card}
    )
    save_artifact(folder / f"{name}.safetensors", made, unit_artifact(made, dimension).tensors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("harm", "other", "third")):
        store(tmp_path, name, dimension=number)
    store(tmp_path, "higher", layer=2)
    return tmp_path


def text(name: str = "harm", *, head: str = HEAD, names: tuple[str, ...] | None = None, **settings: Any) -> str:
    return policy_text(rule("r", detector=name, **settings), head=head, names=names or (name,))


def started(folder: Path, content: str | None = None) -> Deployment:
    path = folder / "running.yaml"
    path.write_text(content or text())
    file = read_policy_file(path)
    artifacts = load_artifacts(file)
    plan = compile_plan(file, artifacts, load_steers(file), d_model=D_MODEL, num_layers=NUM_LAYERS)
    return Deployment(file, artifacts, model_ref(), plan)


def reload(running: Deployment, content: str, *older: Plan) -> Plan:
    needed = Room(running.plan.bank.taps, running.plan.bank.residents())
    room = Room(needed.taps, union(needed.taken, *(plan.bank.residents() for plan in older)))
    return redeploy(running, content, path=running.file.path, room=room, needed=needed).plan


def test_a_new_direction_goes_into_a_free_column_and_an_old_one_stays(folder: Path) -> None:
    running = started(folder)
    plan = reload(running, text("other", names=("other", "harm")))
    assert plan.bank.columns["harm"][Tap(0)].tolist() == running.plan.bank.columns["harm"][Tap(0)].tolist() == [0]
    assert plan.bank.columns["other"][Tap(0)].tolist() == [1]
    assert plan.bank.width == running.plan.bank.width
    assert plan.digest == check_policy(_written(folder, text("other", names=("other", "harm")))).digest


def _written(folder: Path, content: str) -> Path:
    path = folder / "written.yaml"
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (text().replace("block", "blok"), PolicyError),
        (text("harm").replace("detector: harm", "detector: harn"), PolicyError),
        (text("missing"), ArtifactError),
        (text("third", names=("harm", "other", "third")), BankError),
        ("- a list\n", PolicyError),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_check(folder: Path, content: str, kind: type[Exception]) -> None:
    running, path = started(folder), folder / "running.yaml"
    with pytest.raises(kind) as by_check:
        check_policy(_written(folder, content))
    with pytest.raises(kind) as by_reload:
        reload(running, content)
    assert str(by_reload.value) == str(by_check.value).replace(str(folder / "written.yaml"), str(path))


@pytest.mark.parametrize(
    ("setting", "content"),
    [
        ("reserve", text(head="reserve: {directions: 3}\n")),
        ("canary", text(head=f"{HEAD}canary: {{every: 30s}}\n")),
        ("audit", text(head=f'{HEAD}audit: {{url: "sqlite:///a.db"}}\n')),
        ("model", text(head=f"{HEAD}model: another\n")),
        ("detectors", text("higher")),
        ("reserve.directions", text("third", names=("third", "other"))),
    ],
)
def test_what_is_fixed_at_the_start_is_named(folder: Path, setting: str, content: str) -> None:
    check_policy(_written(folder, content))  # as a file to start with it is sound
    with pytest.raises(RestartNeededError) as caught:
        reload(started(folder), content)
    assert caught.value.setting == setting
    assert str(caught.value).startswith(f"restart needed: {setting}: ")


def test_columns_that_older_requests_hold_are_waited_for(folder: Path) -> None:
    running = started(folder)
    older = reload(running, text("other", names=("harm", "other")))
    wanted = text("third", names=("harm", "third"))
    with pytest.raises(NoFreeColumnError, match="Try again then"):
        reload(running, wanted, older)
    assert reload(running, wanted).bank.columns["third"][Tap(0)].tolist() == [1]


def test_an_artifact_of_another_model_is_refused(folder: Path) -> None:
    store(folder, "foreign", model=model_ref(weight_digest="f" * 64))
    with pytest.raises(ArtifactError, match="does not fit the served model"):
        reload(started(folder), text("foreign"))


class TestSteers:
    def steering(self, folder: Path, *rules: str, steers: str = CALM) -> str:
        saved(folder, model=model_ref())
        return policy_text("\n".join(rules or (do("r", STEER),)), head=f"{HEAD}steers: [{steers}]\n")

    def test_another_steer_needs_a_restart(self, folder: Path) -> None:
        running = started(folder, self.steering(folder))
        for steers in (
            CALM.replace("op: cap", "op: cap, strength: 0.5"),
            f"{CALM}, {CALM.replace('name: calm', 'name: b')}",
        ):
            with pytest.raises(RestartNeededError) as caught:
                reload(running, self.steering(folder, steers=steers))
            assert caught.value.setting == "steers"

    def test_a_gate_keeps_its_place_and_gets_the_new_threshold(self, folder: Path) -> None:
        two = (do("first", STEER, when="above: {value: 2.0}"), do("second", STEER, when="above: {value: 3.0}"))
        running = started(folder, self.steering(folder, *two))
        assert [gate.check.thresholds for gate in running.plan.steering.gates] != []
        plan = reload(running, self.steering(folder, two[1].replace("3.0", "5.0")))
        (only,) = plan.policies[0].rules
        assert only.gate is not None
        assert set(plan.steering.gates[only.gate].check.thresholds.values()) == {5.0}
        assert len(plan.steering.gates) == len(running.plan.steering.gates) == 2

    def test_a_gate_where_there_is_none_needs_a_restart(self, folder: Path) -> None:
        running = started(folder, self.steering(folder, rule("watch", action="flag")))
        with pytest.raises(RestartNeededError, match="no gate of the start reads there"):
            reload(running, self.steering(folder))

    def test_a_plan_without_steers_fits_itself(self, folder: Path) -> None:
        plan = started(folder).plan
        assert fitted(plan, plan) == plan


def test_every_setting_that_is_not_looked_at_closely_is_fixed(folder: Path) -> None:
    old = read_policy_file(_written(folder, text())).config
    changed = text(head=f'{HEAD}canary: {{every: 30s}}\naudit: {{url: "sqlite:///a.db"}}\n', action="flag")
    assert fixed_settings(old, read_policy_file(_written(folder, changed)).config) == ["audit", "canary"]
    assert fixed_settings(old, read_policy_file(_written(folder, text(action="flag"))).config) == []


class TestHistory:
    def entry(self, number: int, digest: str, before: str, outcome: ReloadOutcome = ReloadOutcome.APPLIED) -> Reload:
        return Reload(number, datetime.now(UTC), ReloadSource.API, outcome, digest, before, f"text of {digest}")

    def test_back_is_what_ran_before_and_there_again(self) -> None:
        history = History(self.entry(0, "a", "a"))
        history.add(self.entry(history.next_number, "b", "a"))
        history.add(self.entry(history.next_number, "x", "b", ReloadOutcome.REFUSED))
        assert (history.running.digest, history.target(None).digest) == ("b", "a")
        history.add(self.entry(history.next_number, "a", "b"))
        assert history.target(None).digest == "b"
        assert history.target(1).digest == "b"
        with pytest.raises(HistoryError, match=r"no entry 2 that was in force\. To go back to: 0, 1, 3"):
            history.target(2)

    def test_it_is_bounded_and_never_forgets_what_runs(self) -> None:
        history = History(self.entry(0, "a", "a"), limit=3)
        for _ in range(9):
            history.add(self.entry(history.next_number, "x", "a", ReloadOutcome.REFUSED))
        assert [entry.number for entry in history] == [0, 8, 9]
        assert history.running.number == 0
        history.add(self.entry(history.next_number, "b", "a"))
        for _ in range(9):
            history.add(self.entry(history.next_number, "x", "b", ReloadOutcome.REFUSED))
        assert [entry.number for entry in history] == [0, 10, 19]
        assert history.target(None).number == 0

    def test_at_the_start_there_is_nothing_to_go_back_to(self) -> None:
        with pytest.raises(HistoryError, match="nothing ran before"):
            History(self.entry(0, "a", "a")).target(None)
