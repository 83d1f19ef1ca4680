"""The evaluation of a steer: judge, side effects, verdict, and a planted behaviour that is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.artifact import card_path_of
from probes.fit.evaluation.measure import Estimate
from probes.fit.steer.behaviour import BehaviourError, Judge, read_examples
from probes.fit.steer.dose_response import Spread
from probes.fit.steer.evaluation import CARD_KEY, SteerEvaluation, evaluate_steer
from probes.fit.steer.report import write_report
from probes.fit.steer.side_effects import distinct_2, harmless_prompts, is_refusal, longest_repeat
from probes.fit.steer.trial import EvalError, Trial, default_strengths, operators_at, read_prompts
from probes.fit.steer.verdict import Grade, Reference, Strength, decide
from probes.steering.artifact import SteerArtifact
from probes.steering.base import SteerError
from serving.commands.steer import EvalOptions, SteerCommandError, evaluate
from serving.commands.steer_words import StrengthsError
from tests.support.planted import WORD, PlantedModel, make_planted_model
from tests.support.tiny import save_direction

PLAIN = Reference(judge_auroc=0.97, distinct_2=0.9, over_refusal=0.1, prompt_gain=0.2)
GOOD = Strength(
    strength=0.2,
    target=0.7,
    gain=Estimate(0.4, 0.3, 0.5),
    random_top=0.4,
    kl=0.05,
    distinct_2=0.85,
    anti_steered=0.05,
    over_refusal=0.1,
)


@pytest.mark.parametrize(
    ("changes", "reference", "grade", "said"),
    [
        ({}, {}, Grade.SHIP, "Prompting does no more"),
        ({}, {"prompt_gain": 0.4}, Grade.SHIP, "Prompting does no more"),
        ({"kl": 0.1, "anti_steered": 0.1, "over_refusal": 0.15, "distinct_2": 0.73}, {}, Grade.SHIP, "within"),
        ({}, {"prompt_gain": 0.41}, Grade.ASSIST, "Prompting does more"),
        ({"kl": 0.11}, {}, Grade.ASSIST, "KL 0.110"),
        ({"anti_steered": 0.11}, {}, Grade.ASSIST, "11% of the prompts anti-steered"),
        ({"over_refusal": 0.16}, {}, Grade.ASSIST, "refuses 16% of harmless prompts against 10%"),
        ({"distinct_2": 0.7}, {}, Grade.REJECT, "the text degenerates"),
        ({"gain": Estimate(0.4, 0.0, 0.5)}, {}, Grade.REJECT, "its interval is not above 0"),
        ({"random_top": 0.7}, {}, Grade.REJECT, "random directions reach 0.700"),
        ({}, {"judge_auroc": 0.89}, Grade.REJECT, "The judge cannot tell the behaviour"),
    ],
)
def test_each_verdict_is_reached_by_its_figures(
    changes: dict[str, Any], reference: dict[str, float], grade: Grade, said: str
) -> None:
    found = decide([replace(GOOD, **changes)], replace(PLAIN, **reference))
    assert found.grade is grade
    assert said in " ".join(found.reasons)
    # What is recommended is within the limits, or nothing is.
    assert (found.recommended is None) == (grade is Grade.REJECT or (grade is Grade.ASSIST and bool(changes)))


def test_the_largest_gain_within_the_limits_is_recommended() -> None:
    weak = replace(GOOD, strength=0.1, gain=Estimate(0.25, 0.2, 0.3))
    strong = replace(GOOD, strength=0.4, gain=Estimate(0.6, 0.5, 0.7), kl=0.5)
    assert decide([weak, GOOD, strong], PLAIN).recommended == 0.2
    # A strength that breaks down takes nothing from the others.
    broken = replace(strong, distinct_2=0.1)
    assert decide([weak, broken], PLAIN).grade is Grade.SHIP
    # But a real effect that is only had beyond a limit is no more than a help.
    assert decide([replace(weak, kl=0.2), broken], PLAIN).grade is Grade.ASSIST


def test_the_band_of_random_directions_is_no_narrower_than_they_are() -> None:
    spread = Spread((0.2, 0.3, 0.25))
    assert spread.low < min(spread.targets)
    assert spread.top > max(spread.targets)
    assert (Spread((0.2,)).low, Spread((0.2,)).top) == (0.2, 0.2)


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 1, 3], 0),
        ([1, 1], 1),
        ([1, 1, 1, 1], 3),
        ([5, 1, 2, 1, 2], 2),
        ([1, 2, 3, 2, 3, 2], 3),
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 6),
    ],
)
def test_the_longest_repeat_counts_tokens_that_are_said_again_at_once(tokens: list[int], longest: int) -> None:
    assert longest_repeat(tokens) == longest


def test_distinct_2_falls_with_repetition() -> None:
    assert distinct_2([1, 2, 3, 4]) == 1.0
    assert distinct_2([1, 1, 1, 1, 1]) == 0.25
    assert distinct_2([7]) == 1.0


@pytest.mark.parametrize(
    ("reply", "refuses"),
    [
        ("I\u2019m sorry, but I can\u2019t help with that.", True),
        ("As an AI language model, I", True),
        ("You can stop a process with kill.", False),
        ("Use `kill`. " + "x" * 200 + " I cannot", False),
    ],
)
def test_refusals_are_told_by_the_opening(reply: str, refuses: bool) -> None:
    assert is_refusal(reply) is refuses


def test_the_harmless_prompts_are_many_and_different() -> None:
    prompts = harmless_prompts()
    assert len(set(prompts)) == len(prompts) >= 20


def written(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def pairs(count: int = 20) -> list[dict[str, str]]:
    words = ["river", "house", "winter", "paper", "engine", "garden", "letter", "window"]
    return [
        {"positive": f"{words[n % 8]}{WORD}{WORD} {n}", "negative": f"{words[n % 8]} {words[(n + 3) % 8]} {n}"}
        for n in range(count)
    ]


def test_the_judge_knows_a_behaviour_and_admits_what_it_cannot_know(tmp_path: Path) -> None:
    examples = read_examples(written(tmp_path / "pairs.jsonl", pairs()))
    judge = Judge.fit(examples, seed=0)
    assert judge.auroc.value > 0.95
    chances = judge([f"a{WORD}{WORD}", "house winter", ""])
    assert chances[0] > 0.5 > chances[1]
    assert ((chances >= 0) & (chances <= 1)).all()
    # The same texts with labels by lot: nothing is to be learnt, and the groups keep it from being remembered.
    drawn = np.random.default_rng(0).integers(0, 2, size=len(examples))
    lot = [replace(example, label=int(label)) for example, label in zip(examples, drawn, strict=True)]
    assert Judge.fit(lot, seed=0).auroc.value < 0.8


def test_examples_may_be_labelled_texts(tmp_path: Path) -> None:
    lines = [{"text": f"text {n}", "label": n % 2, "group": f"g{n // 2}"} for n in range(24)]
    found = read_examples(written(tmp_path / "texts.jsonl", lines))
    assert [example.label for example in found[:2]] == [0, 1]
    assert len({example.group for example in found}) == 12


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"text": "a", "label": 2}'], r"examples.jsonl:1: not of the form"),
        (['{"positive": "a"}'], r"examples.jsonl:1: not of the form"),
        (["{"], r"examples.jsonl:1: not of the form"),
        (pairs(3), r"6 examples in 3 groups"),
        ([{"text": f"text {n}", "label": 1} for n in range(20)], "texts of both labels"),
    ],
)
def test_examples_that_cannot_be_judged_by_are_refused(tmp_path: Path, lines: Sequence[Any], said: str) -> None:
    with pytest.raises(BehaviourError, match=said):
        read_examples(written(tmp_path / "examples.jsonl", lines))


@pytest.mark.parametrize(
    ("kind", "strengths", "said"),
    [
        ("add", (0.1, 0.2, 0.2, 0.3, 0.4), "names 4 different ones"),
        ("ablate", (0.2, 0.4, 0.6, 0.8, 1.2), "1.2 is out of range for 'ablate'"),
        ("add", (-0.1, 0.1, 0.2, 0.3, 0.4), "has both signs"),
        ("add", (0.0, 0.1, 0.2, 0.3, 0.4), "0.0 is out of range"),
    ],
)
def test_strengths_that_give_no_dose_response_are_refused(kind: str, strengths: tuple[float, ...], said: str) -> None:
    with pytest.raises(EvalError, match=said):
        operators_at(kind, strengths)


def test_operators_are_known_and_start_at_the_weakest() -> None:
    for kind in ("add", "ablate", "cap"):
        assert len(operators_at(kind, default_strengths(kind))) == 5
    assert [operator.strength for operator in operators_at("add", (-0.5, -0.1, -0.3, -0.2, -0.4))] == [  # type: ignore[attr-defined]
        -0.1,
        -0.2,
        -0.3,
        -0.4,
        -0.5,
    ]
    with pytest.raises(SteerError, match="Did you mean 'add'"):
        operators_at("adds", (1, 2, 3, 4, 5))


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="2 prompts; at least 8"):
        read_prompts(written(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}]))
    with pytest.raises(EvalError, match=r"p.jsonl:2: not of the form"):
        read_prompts(written(tmp_path / "p.jsonl", [{"prompt": "a"}, {"text": "b"}]))
    with pytest.raises(EvalError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("eval") / "tiny-llama")


@pytest.fixture(scope="module")
def evaluation(planted: PlantedModel, tmp_path_factory: pytest.TempPathFactory) -> SteerEvaluation:
    folder = tmp_path_factory.mktemp("evaluation")
    trial = Trial(
        prompts=tuple(f"Tell me about {word}" for word in ("rain", "bread", "stone", "trees")),
        instruction=f"Say{WORD}.",
        operators=operators_at("add", (0.001, 0.005, 0.01, 0.05, 0.2)),
        max_tokens=4,
        seeds=2,
        neutral_lines=2,
    )
    judge = Judge.fit(read_examples(written(folder / "pairs.jsonl", pairs())), seed=0)
    artifact = save_direction(folder / "music.safetensors", planted.tiny.path, planted.direction, layer=0)
    return evaluate_steer(artifact, trial, judge, model=planted.model, created_by="test", progress=lambda text: None)


def test_a_planted_behaviour_rises_with_the_dose_and_random_directions_do_nothing(evaluation: SteerEvaluation) -> None:
    response = evaluation.response
    targets = [condition.figures.target.value for condition in response.steered]
    assert targets == sorted(targets)
    assert targets[-1] > response.plain.figures.target.value + 0.3
    assert WORD * 3 in response.steered[-1].samples[0]
    assert response.steered[-1].figures.gain.low > 0
    strongest = response.random[-1]
    assert strongest.spread is not None
    assert strongest.spread.top < targets[-1]
    costs = [condition.figures.kl for condition in response.steered]
    assert costs == sorted(costs)  # type: ignore[type-var]
    for steered, random in zip(response.steered, response.random, strict=True):
        assert steered.strength is not None
        assert steered.figures.dose == pytest.approx(steered.strength, rel=1e-6)
        assert random.figures.dose == pytest.approx(steered.strength, rel=1e-6)
    # The word again and again is an effect, and no text.
    assert response.steered[-1].figures.distinct_2 < 0.8 * response.plain.figures.distinct_2
    assert response.steered[-1].figures.longest_repeat > response.plain.figures.longest_repeat
    assert evaluation.verdict.grade is not Grade.SHIP
    assert (response.plain.figures.kl, response.plain.figures.gain.value) == (0.0, 0.0)


def test_card_and_report_say_the_same(evaluation: SteerEvaluation, tmp_path: Path) -> None:
    tensors = evaluation.artifact.path.read_bytes()
    evaluation.write_card()
    loaded = SteerArtifact.load(evaluation.artifact.path)
    assert evaluation.artifact.path.read_bytes() == tensors
    assert loaded.card.evaluation[CARD_KEY] == json.loads(json.dumps(evaluation.as_dict()))
    path = write_report(evaluation, tmp_path / "report", command="telltale steer eval ...")
    text = path.read_text(encoding="utf-8")
    assert f"**Verdict: `{evaluation.verdict.grade.value}`" in text
    assert "telltale steer eval ..." in text
    assert json.loads(path.with_suffix(".json").read_text()) == loaded.card.evaluation[CARD_KEY]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def options(tmp_path: Path, **changes: Any) -> EvalOptions:
    settings: dict[str, Any] = {
        "op": "add",
        "strengths": None,
        "positions": "generated",
        "max_dose": 0.5,
        "prompts": written(tmp_path / "prompts.jsonl", [{"prompt": f"question {n}"} for n in range(8)]),
        "examples": written(tmp_path / "pairs.jsonl", pairs()),
        "instruction": "Sing.",
        "model": None,
        "max_tokens": 6,
        "seeds": 1,
        "neutral_lines": 2,
        "report": None,
    }
    return EvalOptions(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"positions": "reply"}, SteerCommandError, "--positions is 'reply'. Known: all, generated, prompt"),
        ({"strengths": "0.1;0.2"}, StrengthsError, "numbers with commas between them"),
        ({"strengths": "0.1,0.2"}, EvalError, "at least 5"),
        ({"op": "ad"}, SteerError, "Did you mean 'add'"),
        ({"instruction": " "}, EvalError, "the instruction of the prompt-only baseline"),
        ({"prompts": Path("none.jsonl")}, EvalError, "cannot be read"),
        ({"examples": Path("none.jsonl")}, BehaviourError, "cannot be read"),
        ({"report": Path("/dev/null/report")}, SteerCommandError, "no folder can be made there"),
        ({"strengths": "0.1,0.2,0.3,0.4,0.6"}, SteerError, "max_dose is 0.5"),
    ],
)
def test_the_command_says_what_is_allowed(
    planted: PlantedModel, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    path = tmp_path / "music.safetensors"
    save_direction(path, planted.tiny.path, planted.direction)
    before = card_path_of(path).read_bytes()
    with pytest.raises(error, match=said):
        evaluate(path, options(tmp_path, model=str(planted.tiny.path), **changes))
    assert card_path_of(path).read_bytes() == before


def test_the_command_that_is_reported_is_the_one_that_was_given(tmp_path: Path) -> None:
    found = options(tmp_path, strengths="0.1,0.2", instruction="Answer in French.").command(Path("a.safetensors"))
    assert found.startswith("telltale steer eval a.safetensors --op add --strengths 0.1,0.2 ")
    assert "--instruction 'Answer in French.'" in found
    assert "--report" not in found
