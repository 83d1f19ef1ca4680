"""Autoencoders that ship are called by name: in a policy file, and by the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from monitor.yaml_file import PolicyError
from probes.packs import PackError
from probes.packs.saes import open_sae, sae_names, shipped_sae
from serving.cli import app
from serving.deployment import check_policy

SHIPPED = "builtin:smollm2-135m-instruct/resid_post_15"
POLICY = """\
version: "1"
model: builtin:smollm2-135m-instruct
detectors:
  - {{name: code, kind: sae_latent, sae: "{sae}", latents: [33], threshold: {{value: 5.0}}}}
steers:
  - {{name: less, sae: "{steered}", latent: 33, op: set_latent, target: 0.0, more_is: neutral}}
policies:
  - name: default
    on_gap: flag
    on_uncalibrated: allow
    rules:
      - {{name: watch, when: {{detector: code, stage: prompt}}, do: {{action: flag}}, mode: enforce}}
"""


def policy(folder: Path, *, sae: str = SHIPPED, steered: str = SHIPPED) -> Path:
    path = folder / "telltale.yaml"
    path.write_text(POLICY.format(sae=sae, steered=steered))
    return path


def test_each_name_stands_for_a_whole_file() -> None:
    assert SHIPPED in sae_names()
    for name in sae_names():
        assert open_sae(Path(name)).path == shipped_sae(name)


def test_a_policy_file_reads_and_writes_by_name_as_by_path(tmp_path: Path) -> None:
    by_name = check_policy(policy(tmp_path))
    path = str(shipped_sae(SHIPPED))
    by_path = check_policy(policy(tmp_path, sae=path, steered=path))
    assert by_name.bank.digest() == by_path.bank.digest()
    assert by_name.steering.digest() == by_path.steering.digest()


@pytest.mark.parametrize("key", ["sae", "steered"])
def test_an_unknown_name_is_refused_with_its_place_and_what_there_is(tmp_path: Path, key: str) -> None:
    with pytest.raises(PolicyError, match=r"telltale.yaml:\d+.*resid_post_16.*resid_post_15"):
        check_policy(policy(tmp_path, **{key: SHIPPED.replace("15", "16")}))


def test_check_says_what_is_explained_and_what_it_costs(tmp_path: Path) -> None:
    path = policy(tmp_path)
    plain = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "300"})
    assert plain.exit_code == 0, plain.output
    assert "explain:" not in plain.output
    path.write_text(path.read_text() + f'audit: {{}}\nexplain: {{sae: "{SHIPPED}", per_minute: 7}}\n')
    said = CliRunner().invoke(app, ["check", str(path)], env={"COLUMNS": "300"})
    assert said.exit_code == 0, said.output
    assert f"10 latents each, by {SHIPPED}; at most 7 requests a minute" in said.output


def test_commands_take_the_name(tmp_path: Path) -> None:
    options = ["--latents", "33", "--name", "code", "--out", str(tmp_path)]
    made = CliRunner().invoke(app, ["sae", "detector", SHIPPED, *options])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "code.safetensors").is_file()
    with pytest.raises(PackError, match="resid_post_15"):
        open_sae(Path(SHIPPED.replace("15", "16")))
