"""`telltale detector drift`: made, calibrated and compiled on the text that nobody vouches for, and on no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer
from typer.testing import CliRunner

from monitor.policy import compile_plan
from monitor.types import Role
from monitor.yaml_file import PolicyError
from probes.artifact import Artifact
from probes.card import Card, Format, Stage
from probes.detectors import load_detector
from probes.fit.calibration.calibrate import CalibrationError
from probes.fit.evaluation.measure import auroc
from probes.speaker import Speaker
from serving.cli import app
from tests.support.words import D_MODEL, NUM_LAYERS, WORDS, activations_by_hooks
from tests.unit.artifacts import policy_text, rule, write_policy

WORD = "steal"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path_factory.getbasetemp() / "drift-cache"))


def conversation(rng: np.random.Generator, label: int) -> dict[str, object]:
    """A task that may hold the word, which then means nothing, and a tool's text that does where it is a trap."""
    plain = [word for word in WORDS if word != WORD]
    task, text = (list(rng.choice(plain, int(rng.integers(4, 9)))) for _ in range(2))
    if rng.random() < 0.5:
        task[int(rng.integers(len(task)))] = WORD
    if label:
        text[-1] = WORD
    messages = [{"role": "user", "content": " ".join(task)}, {"role": "tool", "content": " ".join(text)}]
    messages.append({"role": "user", "content": "now"})
    return {"messages": messages, "label": label, "group": " ".join(text)}


def saved(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def made(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    rng = np.random.default_rng(0)
    rows = saved(folder / "rows.jsonl", [conversation(rng, number % 2) for number in range(240)])
    run("detector", "drift", rows, "--layer", 1, "--name", "off_task", "--model", model_dir, "--out", folder)
    return folder / "off_task.safetensors"


def test_it_is_fitted_on_what_the_text_changes(made: Path, model_dir: Path) -> None:
    artifact = Artifact.load(made)
    card = artifact.card
    assert (card.kind, card.formats, card.segments) == ("drift", (Format.CHAT,), (Speaker.TOOL,))
    assert card.canary is not None
    assert card.evaluation["held_out_groups"]["auroc"][0] > 0.9
    detector, tokenizer = load_detector(artifact), AutoTokenizer.from_pretrained(model_dir)
    rng = np.random.default_rng(1)
    moved, last, labels = [], [], []
    for number in range(60):
        row = conversation(rng, number % 2)
        messages: list[dict[str, str]] = row["messages"]  # type: ignore[assignment]
        begun = tokenizer.apply_chat_template(messages[:1], tokenize=False) + "<s> you are a helper . "
        whole = begun + messages[1]["content"]
        ends = [len(tokenizer(text)["input_ids"]) - 1 for text in (begun, whole)]
        stream = activations_by_hooks(model_dir, tokenizer(whole)["input_ids"])
        scores = detector.score(detector.read({tap: stream[tap.layer] for tap in artifact.taps}))
        moved.append(scores[ends[1]] - scores[ends[0]])
        last.append(scores[ends[1]])
        labels.append(number % 2)
    assert auroc(np.array(moved), np.array(labels)) > 0.9


def test_calibrated_on_the_same_text_and_read_by_rules(made: Path, model_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    benign = saved(tmp_path / "benign.jsonl", [conversation(rng, 0) for _ in range(80)])
    run(
        "calibrate", made, "--benign", benign, "--aggregate", "delta", "--target-fpr", "0.05", "--model", model_dir,
        "--out", tmp_path,
    )  # fmt: skip
    artifact = Artifact.load(tmp_path / made.name)
    (calibration,) = artifact.card.calibrations
    assert (calibration.stage, calibration.format, calibration.certified) == (Stage.PROMPT, Format.CHAT, True)

    # The largest statistic is that of the tool's text alone, computed apart.
    detector, tokenizer = load_detector(artifact), AutoTokenizer.from_pretrained(model_dir)
    expected = []
    for line in benign.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        begun = tokenizer.apply_chat_template(messages[:1], tokenize=False)
        first = len(tokenizer(begun)["input_ids"]) + 5  # "</s><s>" is one token
        count = len(messages[1]["content"].split())
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        stream = activations_by_hooks(model_dir, tokenizer(text)["input_ids"])
        scores = detector.score(detector.read({tap: stream[tap.layer] for tap in artifact.taps}))
        expected.append(scores[first + count - 1] - scores[first - 1])
    assert calibration.top_scores[0] == pytest.approx(max(expected), rel=1e-3)

    def compiled(text: str) -> tuple[Role, ...] | None:
        file = write_policy(tmp_path, policy_text(text, names=["off_task"]))
        plan = compile_plan(file, {"off_task": artifact}, d_model=D_MODEL, num_layers=NUM_LAYERS)
        return plan.checks[0].segments

    assert compiled(rule("r", detector="off_task")) == (Role.TOOL,)
    assert compiled(rule("r", detector="off_task", when="segments: [tool]")) == (Role.TOOL,)
    with pytest.raises(PolicyError, match=r"was fitted on the text of \['tool'\]"):
        compiled(rule("r", detector="off_task", when="segments: [tool, user]"))
    with pytest.raises(PolicyError, match="Say stage: prompt"):
        compiled(
            rule(
                "r",
                detector="off_task",
                stage="response",
                action="flag",
                when="aggregate: {kind: delta}, above: {value: 1}",
            )
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "bake bread now please", "label": number % 2} for number in range(4)], "there is no text of tool"),
        ([{"messages": [{"role": "user", "content": "now"}, {"role": "tool", "content": "x"}], "label": 1}], "Both"),
    ],
)
def test_rows_that_show_no_change_are_named(
    rows: list[dict[str, object]], message: str, model_dir: Path, tmp_path: Path
) -> None:
    path = saved(tmp_path / "rows.jsonl", rows)
    words = ["detector", "drift", str(path), "--layer", "1", "--name", "x", "--model", str(model_dir)]
    with pytest.raises(Exception, match=message):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    assert not (tmp_path / "x.safetensors").exists()


def test_no_thresholds_by_length_which_the_server_counts_otherwise(made: Path, model_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    benign = saved(tmp_path / "benign.jsonl", [conversation(rng, 0) for _ in range(200)])
    words = ["calibrate", str(made), "--benign", str(benign), "--aggregate", "delta", "--target-fpr", "0.05"]
    words += ["--model", str(model_dir), "--out", str(tmp_path), "--buckets", "6"]
    with pytest.raises(CalibrationError, match="thresholds by length"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_only_prompts_of_chats_have_speakers(made: Path) -> None:
    content = Artifact.load(made).card.model_dump(mode="json")
    for change in ({"formats": ["chat", "raw"]}, {"segments": ["tool", "tool"]}, {"segments": ["nobody"]}):
        with pytest.raises(ValidationError):
            Card.model_validate(content | change)
    assert "segments" not in Card.model_validate(content | {"segments": []}).model_dump(mode="json")
