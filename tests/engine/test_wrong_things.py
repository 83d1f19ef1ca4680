"""What is wrong is refused before anything is served: a message that says what to do, and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from probes.artifact import card_path_of
from tests.support.server import SMALL, Refusal, refusal_in, refusing, telltale_command
from tests.support.tiny import TinyModel, save_trigger

pytestmark = pytest.mark.engine

TELLTALE = str(Path(sys.executable).parent / "telltale")
POLICY = """\
version: "1"
detectors:
  - artifact: trigger.safetensors
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    rules:
      - {name: stop, when: {detector: trigger, stage: prompt}, do: {action: block}, mode: enforce}
"""


@pytest.fixture
def work(tmp_path: Path, tiny: TinyModel) -> Path:
    prepared(tmp_path, tiny.path)
    return tmp_path


# What is noticed only when vLLM has been imported takes long: such starts run beside the tests before theirs.
@pytest.fixture(scope="module", autouse=True)
def unknown_architecture(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refusal]:
    folder = tmp_path_factory.mktemp("architecture")
    model = folder / "bloom"
    shutil.copytree(tiny.path, model)
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=49152, hidden_size=128, n_layer=2, n_head=4)).save_pretrained(model)
    with refusing(telltale_command(model, prepared(folder, model)), folder / "stderr.txt") as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def blinding_setting(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Refusal]:
    folder = tmp_path_factory.mktemp("setting")
    setting = ("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler")
    command = telltale_command(tiny.path, prepared(folder, tiny.path), *setting)
    with refusing(command, folder / "stderr.txt") as started:
        yield started


def prepared(folder: Path, model: Path) -> Path:
    save_trigger(folder / "trigger.safetensors", model)
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    return policy


def refused(*arguments: str, environment: dict[str, str] | None = None, timeout: float = 120) -> str:
    done = subprocess.run(
        [TELLTALE, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return refusal_in(done.returncode, done.stderr)


def serve(work: Path, model: Path, *flags: str, **settings: object) -> str:
    return refused("serve", str(model), "--policy", str(work / "policy.yaml"), *SMALL, *flags, **settings)  # type: ignore[arg-type]


def test_a_typo_in_the_policy_is_named_with_its_line(work: Path, tiny: TinyModel) -> None:
    (work / "policy.yaml").write_text(POLICY.replace("detector: trigger", "detector: triger"))
    for message in (serve(work, tiny.path), refused("check", str(work / "policy.yaml"))):
        assert "policy.yaml:9: policies[0].rules[0].when.detector: is 'triger'. Did you mean 'trigger'?" in message


def test_a_correct_policy_is_checked_without_a_model(work: Path) -> None:
    done = subprocess.run([TELLTALE, "check", str(work / "policy.yaml")], capture_output=True, text=True, check=True)
    assert "ok:" in done.stdout
    assert "resid_post.0" in done.stdout


@pytest.mark.covers("artifact of another model, or damaged", "refused at the start")
def test_an_artifact_for_another_model_names_the_field(work: Path, tiny: TinyModel) -> None:
    card = json.loads(card_path_of(work / "trigger.safetensors").read_text())
    card["model"]["weight_digest"] = "1" * 64
    card_path_of(work / "trigger.safetensors").write_text(json.dumps(card))
    message = serve(work, tiny.path)
    assert "does not fit the served model" in message
    assert "weight_digest" in message
    assert "tokenizer_digest" not in message


@pytest.mark.covers("artifact of another model, or damaged", "refused at the start")
def test_a_truncated_artifact_is_refused(work: Path, tiny: TinyModel) -> None:
    path = work / "trigger.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    assert "truncated, damaged" in serve(work, tiny.path)


def test_a_port_in_use_is_refused_at_once(work: Path, tiny: TinyModel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = serve(work, tiny.path, "--port", str(port), timeout=30)
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert "choose another --port" in message


@pytest.mark.covers("vLLM outside the range", "refused at the start")
def test_a_vllm_outside_the_range_is_refused(work: Path, tiny: TinyModel) -> None:
    # A distribution of that version in front of the installed one, as a hasty upgrade would leave it.
    metadata = work / "site" / "vllm-0.33.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.1\n")
    message = serve(work, tiny.path, environment={"PYTHONPATH": str(work / "site")})
    assert "vllm 0.33.1 is installed; this version of telltale supports" in message


@pytest.mark.covers("architecture that was not read", "refused at the start")
def test_an_unknown_architecture_is_refused(unknown_architecture: Refusal) -> None:
    message = unknown_architecture.message()
    assert "BloomForCausalLM" in message
    assert "serving/engine/layers/known.py" in message


@pytest.mark.covers("setting under which tokens pass unseen", "refused at the start")
def test_a_setting_that_would_blind_the_monitor_is_refused(blinding_setting: Refusal) -> None:
    assert "--scheduler-cls" in blinding_setting.message()


def test_two_models_are_one_too_many(work: Path, tiny: TinyModel) -> None:
    (work / "policy.yaml").write_text(POLICY.replace("detectors:", "model: somebody/else\ndetectors:"))
    assert "the policy file 'somebody/else'" in serve(work, tiny.path)


def test_a_model_without_a_policy_is_not_served(tiny: TinyModel) -> None:
    assert "--policy FILE" in refused("serve", str(tiny.path))


def test_a_folder_of_our_name_in_the_working_directory_is_noticed(work: Path, tiny: TinyModel) -> None:
    (work / "monitor").mkdir()
    (work / "monitor" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "serving.cli", "check", "policy.yaml"],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "shadows" in done.stderr
