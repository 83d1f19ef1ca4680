"""The command line: quick to answer, and clear about what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import serving
from serving.cli import app

COMMANDS = ("serve", "check", "doctor", "train", "canary", "schema", "bench")


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
    assert set(plan.cards) == {"harmful_request"}
