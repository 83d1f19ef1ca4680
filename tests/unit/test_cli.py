"""The command line: quick to answer, and clear about what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import serving
from probes.card import Canary, Stage
from serving.cli import app
from tests.unit.artifacts import calibration, make_card, policy_text, rule, saved_artifact
from tests.unit.test_steers import CALM, STEER, do
from tests.unit.test_steers import saved as saved_steer

COMMANDS = (
    *("serve", "check", "doctor", "train", "eval", "report", "calibrate", "canary", "schema", "bench", "steer", "gate"),
    *("detector", "collect", "audit", "tail", "top", "sinks", "policy"),
)


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from serving.cli import app; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(app, ['--help']); print(result.output);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers', 'numpy', 'sklearn')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"telltale {serving.__version__}"


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["srve"]).exit_code == 2


@pytest.mark.parametrize("content", ["version: 1\n", "", "- a\n"])
def test_check_refuses_what_is_no_policy(content: str, tmp_path: Path) -> None:
    policy = tmp_path / "telltale.yaml"
    policy.write_text(content)
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "check", str(policy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"telltale: {policy}:1:")
    assert "Traceback" not in done.stderr


def test_the_shipped_policy_is_sound() -> None:
    from serving.commands.model import embedded_policy
    from serving.deployment import check_policy

    plan = check_policy(embedded_policy())
    assert [policy.name for policy in plan.policies] == ["default"]
    assert {"harmful_request", "prompt_injection"} <= set(plan.cards)


@pytest.mark.parametrize("has_canary", [True, False])
def test_check_names_detectors_without_a_canary(tmp_path: Path, has_canary: bool) -> None:
    card = make_card(calibrations=[calibration()])
    canary = Canary(tokens=tuple(range(8)), scores=(0.0,) * 7, tolerance=0.1, reference="by hand")
    saved_artifact(tmp_path, card.model_copy(update={"canary": canary if has_canary else None}))
    (tmp_path / "telltale.yaml").write_text(policy_text(rule("r")))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "telltale.yaml")])
    assert result.exit_code == 0, result.output
    assert ("without a canary: harm" in " ".join(result.output.split())) != has_canary


@pytest.mark.parametrize(
    ("when", "gate", "begins"),
    [
        ("", "latched", "in the pass, behind the row"),
        ("", "token", "in the pass, the row alone"),
        ("aggregate: {kind: last}, above: {value: 1}", "latched", "from the next step on"),
    ],
)
def test_check_says_what_is_written_and_from_when_on(tmp_path: Path, when: str, gate: str, begins: str) -> None:
    saved_artifact(tmp_path, make_card(calibrations=[calibration(Stage.STREAM)]))
    saved_steer(tmp_path)
    wanted = do("r", STEER.replace("latched", gate), when=when)
    head = f"steers: [{CALM}, {CALM.replace('name: calm', 'name: mild')}]\n"
    (tmp_path / "telltale.yaml").write_text(policy_text(wanted, head=head, policy="on_request: [mild]"))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "telltale.yaml")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"steer calm after resid_post.1, generated ({begins})" in said
    assert "steers who asks for it: mild after resid_post.1, generated" in said


def test_an_artifact_that_is_not_there_gets_no_canary(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "canary", str(tmp_path / "none.safetensors"), "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "none.safetensors: cannot be read" in done.stderr
