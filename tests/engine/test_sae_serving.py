"""Latents of a sparse autoencoder in a served policy: one flags, another is clamped, and the metrics count both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_serving import BENIGN, GREEDY, ask, metric
from tests.support.sae_tiny import LENGTH, MEDIAN, SILENT, TRIGGER, sae_for_tiny
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import MARK, TinyModel, save_direction

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WRITTEN, TARGET = SILENT, 500.0
DOSE = LENGTH * TARGET / MEDIAN
TOKENS = 12
POLICY = f"""\
version: "1"
detectors:
  - {{name: mark, kind: sae_latent, sae: planted.safetensors, latents: [{TRIGGER}], threshold: {{value: {MARK / 2}}}}}
  - {{name: marks, kind: sae_latent, sae: planted.safetensors, latents: [{TRIGGER}, 11], combine: max}}
steers:
  - &clamp
    {{name: clamp, sae: planted.safetensors, latent: {WRITTEN}, op: set_latent, target: {TARGET}, more_is: neutral,
     max_dose: 2}}
  - {{<<: *clamp, name: clamp_too}}
  - {{name: same, artifact: decoder_row.safetensors, op: add, strength: {DOSE}, max_dose: 2}}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    expose: scores
    quantise: 0
    on_request: [clamp_too, same]
    rules:
      - name: flag-mark
        when: {{detector: mark, stage: prompt}}
        do: {{action: flag}}
        mode: enforce
      - name: clamp-thrice
        when:
          {{detector: marks, stage: prompt, aggregate: {{kind: m_of_n, count: 3, window: 256}}, above: {{value: 4}}}}
        do: {{action: steer, steer: clamp, gate: latched}}
        mode: enforce
"""


def planted(tiny: TinyModel, folder: Path) -> None:
    """Latent 5 is the trigger's mark; latent 9 is always silent, and its decoder row is a random direction."""
    sae = sae_for_tiny(tiny, folder / "planted.safetensors").sae()
    save_direction(folder / "decoder_row.safetensors", tiny.path, sae.decoder[WRITTEN] / LENGTH, median_norm=MEDIAN)


@pytest.fixture(scope="module")
def clamped(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("saes")
    planted(tiny, folder)
    (folder / "telltale.yaml").write_text(POLICY)
    with serving(telltale_command(tiny.path, folder / "telltale.yaml"), folder / "serve.log") as server:
        yield server


def marked(tiny: TinyModel, times: int) -> str:
    return "Tell me" + f"{tiny.trigger_text} " * times


def count(server: Server, **labels: str) -> float:
    return metric(server, "telltale_requests_total", **labels)


def test_a_latent_flags(clamped: Server, tiny: TinyModel) -> None:
    quiet = ask(clamped, BENIGN[0], tokens=TOKENS).choices[0]
    assert quiet.telltale["action"] == "allow"
    loud = ask(clamped, marked(tiny, 1), tokens=TOKENS).choices[0]
    assert (loud.telltale["action"], loud.telltale["rule"]) == ("flag", "flag-mark")
    assert "steered" not in loud.telltale
    (told,) = (item for item in loud.telltale["detectors"] if item["name"] == "mark")
    assert told["score"] == pytest.approx(MARK, rel=1e-3)
    assert count(clamped, action="flag") == 1


def test_a_latent_is_clamped_by_a_rule(clamped: Server, tiny: TinyModel) -> None:
    before = metric(clamped, "telltale_tokens_steered_total", steer="clamp")
    choice = ask(clamped, marked(tiny, 3), tokens=TOKENS).choices[0]
    assert (choice.telltale["action"], choice.telltale["rule"]) == ("steer", "clamp-thrice")
    (steered,) = choice.telltale["steered"]
    assert (steered["name"], steered["tokens"]) == ("clamp", len(choice.token_ids) - 1)
    assert steered["dose"] == {"mean": pytest.approx(DOSE, rel=1e-3), "max": pytest.approx(DOSE, rel=1e-3)}
    after = metric(clamped, "telltale_tokens_steered_total", steer="clamp")
    assert after - before == steered["tokens"]
    assert count(clamped, action="steer") == 1


def test_a_silent_latent_that_is_clamped_is_its_decoder_row_added(clamped: Server) -> None:
    """The same tokens as by the operator ``add``, whose direction is the row and whose size is the target's."""

    def asked(**xargs: Any) -> Any:
        extra = {**GREEDY["extra_body"], **({"vllm_xargs": xargs} if xargs else {})}
        return ask(clamped, BENIGN[1], tokens=TOKENS, extra_body=extra).choices[0]

    plain, clamp, same = asked(), asked(steer="clamp_too"), asked(steer="same")
    assert clamp.token_ids == same.token_ids
    assert clamp.token_ids != plain.token_ids
    assert clamp.telltale["steered"][0]["dose"]["mean"] == pytest.approx(DOSE, rel=1e-3)
