"""Steers in a policy file: what may be written, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.dose import Dose
from monitor.policy import Plan, compile_plan
from monitor.rule import Gate
from monitor.types import Action
from monitor.yaml_file import PolicyError
from probes.artifact import ArtifactError
from probes.card import Stage
from probes.steering.artifact import Safety, SteerArtifact, SteerCard, save_steer
from probes.steering.base import Sign
from probes.steering.steer import END, Positions
from serving.engine.steer_request import SteerRequestError, asked_steers
from tests.unit.artifacts import (
    D_MODEL,
    DIGEST,
    NUM_LAYERS,
    calibration,
    make_card,
    model_ref,
    policy_text,
    rule,
    unit_artifact,
    write_policy,
)

CALM = "{name: calm, artifact: calm.safetensors, op: cap}"
STEER = "{action: steer, steer: calm, gate: latched}"


def direction(**changes: Any) -> SteerCard:
    fields: dict[str, Any] = {
        "name": "calm",
        "description": "made by a test",
        "model": model_ref(),
        "tap": "resid_post.1",
        "more_is": Safety.NEUTRAL,
        "skip_first": 2,
        "median_norm": 5.0,
        "mean": 0.5,
        "ceiling": 2.0,
        "corpus_rows": 100,
        "corpus_digest": DIGEST,
        "tensors_digest": DIGEST,
    }
    return SteerCard(**(fields | changes))


def saved(folder: Path, **changes: Any) -> SteerArtifact:
    values = np.zeros(changes.pop("width", D_MODEL))
    values[3] = changes.pop("length", 1.0)
    return save_steer(folder / "calm.safetensors", direction(**changes), values)


def do(name: str, what: str, *, stage: str = "stream", mode: str = "enforce", when: str = "") -> str:
    return rule(name, stage=stage, mode=mode, when=when).replace("{action: block}", what)


def compiled(
    folder: Path, steers: str = CALM, rules: str = "", policy: str = "", *, layer: int = 0, **changes: Any
) -> Plan:
    saved(folder, **changes)
    head = f"steers: [{steers}]\n"
    file = write_policy(folder, policy_text(rules or rule("watch", action="flag"), head=head, policy=policy))
    card = make_card(calibrations=[calibration(), calibration(Stage.STREAM)], layers=(layer,))
    steer = {entry.name: SteerArtifact.load(folder / entry.artifact) for entry in file.config.steers}
    return compile_plan(file, {"harm": unit_artifact(card)}, steer, d_model=D_MODEL, num_layers=NUM_LAYERS)


def refusal(folder: Path, *args: Any, **settings: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        compiled(folder, *args, **settings)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_rule_and_a_policy_name_their_steers(tmp_path: Path) -> None:
    other = "{name: push, artifact: calm.safetensors, op: add, strength: 0.25, positions: all}"
    plan = compiled(tmp_path, f"{CALM}, {other}", do("r", STEER), "steers: [push]")
    (policy,) = plan.policies
    assert (policy.rules[0].action, policy.rules[0].steer, policy.steers) == (Action.STEER, 0, (1,))
    calm, push = plan.steering.steers
    assert (calm.positions, calm.update.limit, calm.unit) == (Positions.GENERATED, 2.5, 5.0)
    assert (push.positions, push.update.constant) == (Positions.ALL, 1.25)
    (matrix,) = plan.steering.matrices
    assert matrix.columns == (0, 1)
    assert matrix.read.shape == (D_MODEL, 2)


@pytest.mark.parametrize(("positions", "span"), [("generated", (10, END)), ("prompt", (2, 10)), ("all", (2, END))])
def test_sinks_are_never_written_to(tmp_path: Path, positions: str, span: tuple[int, int]) -> None:
    plan = compiled(tmp_path, CALM.replace("op:", f"positions: {positions}, op:"))
    assert plan.steering.steers[0].span(10) == span
    assert plan.steering.steers[0].span(1) == (2, max(span[1], 1) if span[1] == END else 1)


def test_a_plan_with_another_strength_has_another_digest(tmp_path: Path) -> None:
    digests = {
        compiled(tmp_path, CALM.replace("op: cap", f"op: cap, strength: {strength}")).digest for strength in (0.5, 0.25)
    }
    digests.add(compiled(tmp_path, CALM.replace("op: cap", "op: cap, strength: 0.5"), ceiling=3.0).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("steers", "said"),
    [
        (CALM.replace("cap", "kap"), "telltale.yaml:2: steers[0]: 'op': the steering operator 'kap' is not known. Did"),
        (
            CALM.replace("cap", "cap, strenght: 1"),
            "'strenght' is not a key of a steer with op: cap. Did you mean 'streng",
        ),
        (CALM.replace("cap", "cap, strength: 2"), "'strength': Input should be less than or equal to 1 (op: cap)"),
        (CALM.replace("cap", "add"), "'strength': Field required (op: add)"),
        (CALM.replace("cap", "cap, max_dose: 0"), "steers[0].max_dose: is 0: "),
        (CALM.replace("cap", "cap, positions: some"), "steers[0].positions: is 'some'. Known: all, generated, prompt."),
        (f"{CALM}, {CALM}", "two steers are named 'calm'; give one of them another name."),
        (CALM.replace("cap", "add, strength: 0.6"), "adds 0.6 median norms to every row, and max_dose is 0.5"),
    ],
)
def test_a_steer_that_cannot_be_is_refused(tmp_path: Path, steers: str, said: str) -> None:
    assert said in refusal(tmp_path, steers)


@pytest.mark.parametrize(
    ("rules", "policy", "said"),
    [
        (do("r", STEER.replace("calm", "clam")), "", "rules[0].do.steer: is 'clam'. Did you mean 'calm'?"),
        (do("r", "{action: steer, steer: calm}"), "", "'action: steer' also needs 'gate'"),
        (do("r", "{action: flag, steer: calm}"), "", "'steer' says how to steer; it stands with"),
        (do("r", STEER.replace("latched", "sometimes")), "", "rules[0].do.gate: is 'sometimes'. "),
        (do("r", STEER, stage="response"), "", "steers at the stage 'response': by then nothing is left"),
        ("", "steers: [clam]", "policies[0].steers[0]: is 'clam'. Did you mean 'calm'?"),
        ("", "steers: [calm, calm]", "'steers' names 'calm' twice; name each once."),
        ("", "on_request: [calm, calm]", "'on_request' names 'calm' twice; name each once."),
        ("", "on_request: [clam]", "policies[0].on_request[0]: is 'clam'. Did you mean 'calm'?"),
        ("", "steers: [calm]\non_request: [calm]", "'on_request' names 'calm', which this policy also applies by"),
        (do("r", STEER), "on_request: [calm]", "a request could ask for less of it. List a steer of its own"),
        ("", "on_gap: steer", "policies[0].on_gap: is 'steer'. "),
    ],
)
def test_a_rule_or_policy_that_cannot_steer_is_refused(tmp_path: Path, rules: str, policy: str, said: str) -> None:
    assert said in refusal(tmp_path, CALM, rules, policy)


def test_a_condition_that_one_row_decides_becomes_a_gate(tmp_path: Path) -> None:
    for kind in Gate:
        plan = compiled(tmp_path, CALM, do("r", STEER.replace("latched", kind.value)))
        (gate,) = plan.steering.gates
        assert plan.policies[0].rules[0].gate == 0
        assert (gate.kind, gate.steer, str(gate.tap)) == (kind, 0, "resid_post.0")
        assert (gate.column, gate.offset) == (0, 0)
        assert gate.check == plan.checks[plan.policies[0].rules[0].verdicts[0]]


@pytest.mark.parametrize(
    ("when", "layer", "because"),
    [
        ("aggregate: {kind: last}, above: {value: 2}", 0, "aggregate last rests on several rows"),
        ("segments: [user]", 0, "whose tokens a row belongs to ('segments') is not known in the pass"),
        ("", 2, "'harm' is read at resid_post.2, above the steer at resid_post.1"),
    ],
)
def test_what_several_rows_decide_switches_on_a_steer_only_behind_the_prompt(
    tmp_path: Path, when: str, layer: int, because: str
) -> None:
    rules = do("r", STEER, stage="prompt", when=when)
    plan = compiled(tmp_path, CALM, rules, layer=layer)
    assert (plan.policies[0].rules[0].steer, plan.policies[0].rules[0].gate, plan.steering.gates) == (0, None, ())
    said = refusal(tmp_path, CALM.replace("cap", "cap, positions: all"), rules, layer=layer)
    assert f"rules[0].do.steer: writes to positions: all, but {because}" in said
    said = refusal(tmp_path, CALM.replace("cap", "cap, positions: all"), rules.replace("latched", "token"), layer=layer)
    assert f"rules[0].do.gate: is 'token', but {because}" in said


def test_a_gate_that_could_never_open_is_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, CALM, do("r", STEER.replace("latched", "token"), stage="prompt"))
    assert "rules[0].do.gate: is 'token' at the stage 'prompt', and 'calm' writes to positions: generated" in said
    said = refusal(tmp_path, CALM.replace("cap", "cap, positions: all"), do("r", STEER))
    assert "rules[0].do.steer: is 'calm', which writes to positions: all; at the stage 'stream' the reply is" in said


def test_a_shadow_rule_has_no_gate(tmp_path: Path) -> None:
    plan = compiled(tmp_path, CALM, do("r", STEER, mode="shadow"))
    assert plan.steering.gates == ()


@pytest.mark.parametrize(
    ("more_is", "op", "lowers"),
    [
        ("safer", "cap", True),
        ("safer", "ablate", True),
        ("safer", "add, strength: -0.1", True),
        ("safer", "add, strength: 0.1", False),
        ("less_safe", "add, strength: 0.1", True),
        ("less_safe", "cap", False),
        ("neutral", "ablate", False),
    ],
)
def test_making_a_model_less_safe_has_to_be_allowed(tmp_path: Path, more_is: str, op: str, lowers: bool) -> None:
    steer = CALM.replace("cap", op)
    if lowers:
        said = refusal(tmp_path, steer, more_is=more_is)
        assert "the model would become less safe. If that is what you want, say allow_safety_reducing: true" in said
        steer = steer.replace("op:", "allow_safety_reducing: true, op:")
    assert len(compiled(tmp_path, steer, more_is=more_is).steering.steers) == 1


@pytest.mark.parametrize("stage", ["prompt", "stream"])
@pytest.mark.parametrize("positions", ["generated", "all"])
@pytest.mark.parametrize("layer", [1, 2])
def test_an_enforcing_rule_above_a_steer_that_it_would_read_is_refused(
    tmp_path: Path, stage: str, positions: str, layer: int
) -> None:
    steer = CALM.replace("cap", f"cap, positions: {positions}")
    rules = rule("r", stage=stage, action="flag")
    if layer > 1 and (stage, positions) != ("prompt", "generated"):
        said = refusal(tmp_path, steer, rules, "steers: [calm]", layer=layer)
        assert "is 'harm', which reads resid_post.2, above the steer 'calm' after resid_post.1" in said
        compiled(tmp_path, steer, rules.replace("enforce", "shadow"), "steers: [calm]", layer=layer)
        compiled(tmp_path, steer, rules, layer=layer)  # nothing uses the steer
    else:
        compiled(tmp_path, steer, rules, "steers: [calm]", layer=layer)


def test_a_direction_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "steers[0]: the direction has the length 0.5; it must be 1 within" in refusal(tmp_path, length=0.5)
    with pytest.raises(ArtifactError, match=r"has the shape \(5,\); it must be \(8,\)"):
        compiled(tmp_path, width=5)
    beyond = refusal(tmp_path, tap="resid_post.4")
    assert "writes 8 dimensions after resid_post.4; the model has 8 and the layers 0 to 3" in beyond
    with pytest.raises(ValueError, match=r"what is written is the residual stream: resid_post.<layer>"):
        direction(tap="mlp_out.1")


def test_a_direction_of_another_model_is_refused(tmp_path: Path) -> None:
    artifact = saved(tmp_path)
    artifact.require_model(model_ref())
    with pytest.raises(ArtifactError, match=r"steering direction 'calm' was made on 'fake'.*weight_digest.*telltale v"):
        artifact.require_model(model_ref(weight_digest="d" * 64))


def test_more_of_a_safe_direction_is_safe(tmp_path: Path) -> None:
    artifact = saved(tmp_path, more_is=Safety.SAFER)
    assert [artifact.lowers_safety(sign) for sign in Sign] == [True, False]


def test_a_dose_counts_only_what_was_changed() -> None:
    dose = Dose()
    assert dose.mean == 0
    dose.add(np.array([0.0, 0.5, 0.0, 0.25]))
    dose.add(np.zeros(3))
    assert (dose.tokens, dose.mean, dose.largest) == (2, 0.375, 0.5)


ASKED = "{name: push, artifact: calm.safetensors, op: add, strength: -0.2}"


@pytest.mark.parametrize(
    ("xargs", "found"),
    [
        ({}, {}),
        ({"other": 1}, {}),
        ({"steer": "calm"}, {"calm": 1.0}),
        ({"steer": "calm", "steer_strength": 0.25}, {"calm": 0.5}),
        ({"steer": "push", "steer_strength": -0.05}, {"push": 0.25}),
    ],
)
def test_a_request_may_ask_for_what_its_policy_lists(
    tmp_path: Path, xargs: dict[str, Any], found: dict[str, float]
) -> None:
    steers = f"{CALM.replace('cap', 'cap, strength: 0.5')}, {ASKED}"
    plan = compiled(tmp_path, steers, policy="on_request: [calm, push]")
    assert asked_steers(xargs, plan, 0) == pytest.approx(found)


def test_a_policy_that_lists_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(SteerRequestError, match=r"lets requests ask for no steer\. Leave it out.*'on_request'"):
        asked_steers({"steer": "calm"}, compiled(tmp_path), 0)


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"steer": "clam"}, r"steer is 'clam'\. Did you mean 'calm'\? Known: calm"),
        ({"steer": "push"}, r"steer is 'push'\. Known: calm"),
        ({"steer": ["calm"]}, r"steer is \['calm'\]"),
        ({"steer_strength": 1}, r"steer_strength is given without steer"),
        ({"steer": "calm", "steer_strength": 0.6}, r"is 0\.6; the steer 'calm' takes above 0 to 0\.5"),
        ({"steer": "calm", "steer_strength": 0}, r"is 0; the steer"),
        ({"steer": "calm", "steer_strength": -0.1}, r"is -0\.1; the steer"),
        ({"steer": "calm", "steer_strength": True}, r"is True; the steer"),
        ({"steer": "calm", "steer_strength": "0.1"}, r"is '0\.1'; the steer"),
        ({"steer": "calm", "steer_strength": float("nan")}, r"is nan; the steer"),
    ],
)
def test_a_request_gets_nothing_else(tmp_path: Path, xargs: dict[str, Any], said: str) -> None:
    steers = f"{CALM.replace('cap', 'cap, strength: 0.5')}, {ASKED}"
    plan = compiled(tmp_path, steers, policy="on_request: [calm]")
    with pytest.raises(SteerRequestError, match=said):
        asked_steers(xargs, plan, 0)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_second_attempt_is_steered_only_below_what_judges_it(tmp_path: Path, layer: int) -> None:
    when = "{detector: harm, stage: stream, aggregate: {kind: max}, above: {value: 1}}"
    again = f"{{name: r, when: {when}, do: {{action: regenerate, steer: calm}}, mode: enforce}}"
    if layer > 1:
        assert "above the steer 'calm' after resid_post.1" in refusal(tmp_path, CALM, again, layer=layer)
        return
    (policy,) = compiled(tmp_path, CALM, again).policies
    # Nothing of a first attempt is steered: the rule has no steer of its own, no gate, and nobody may ask for it.
    assert (policy.rules[0].steer, policy.rules[0].gate) == (None, None)
    assert (policy.second_steers, policy.on_request, policy.steers) == ((0,), (), ())
