"""Latents that a policy raises and reduces: what becomes of the stream is what the operators' definitions say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from monitor.policy import Plan
from probes.sae.file import SaeFile
from probes.steering.steer import Steer
from serving.deployment import check_policy
from tests.engine.steering_runs import NEW_TOKENS, Result, random_tokens, run_entries
from tests.support.sae_tiny import LENGTH, MEDIAN, SILENT, sae_for_tiny
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FLOOR, BY = 30.0, 8.0
RAISED, REDUCED = 3, 4
STEERS = {
    "raised": ("raise_latent", f"floor: {FLOOR}", RAISED),
    "reduced": ("reduce_latent", f"by: {BY}", REDUCED),
    "raised_silent": ("raise_latent", f"floor: {FLOOR}", SILENT),
    "reduced_silent": ("reduce_latent", f"by: {BY}", SILENT),
}
POLICY = """\
version: "1"
detectors:
  - artifact: trigger.safetensors
steers:
{steers}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    hold_back: 0
    steers: [{always}]
    rules:
      - {{name: on-trigger, when: {{detector: trigger, stage: prompt}}, do: {{action: flag}}, mode: shadow}}
"""
SETS = {**{name: (name,) for name in STEERS}, "both": ("raised", "reduced"), "none": ()}


def written(names: tuple[str, ...]) -> str:
    entries = (
        f"  - {{name: {name}, sae: latents_of_tiny.safetensors, latent: {latent}, op: {op}, {parameter}, "
        "more_is: neutral, positions: generated, max_dose: 2}"
        for name, (op, parameter, latent) in ((name, STEERS[name]) for name in names)
    )
    text = POLICY.format(steers="\n".join(entries), always=", ".join(names))
    return text if names else text.replace("steers:\n\n", "")


@pytest.fixture(scope="module")
def sae(tiny: TinyModel) -> SaeFile:
    return sae_for_tiny(tiny, tiny.path.parent / "latents_of_tiny.safetensors")


@pytest.fixture(scope="module")
def plans(tiny: TinyModel, sae: SaeFile) -> Mapping[str, Plan]:
    for name, steers in SETS.items():
        (tiny.path.parent / f"latents_{name}.yaml").write_text(written(steers))
    return {name: check_policy(tiny.path.parent / f"latents_{name}.yaml") for name in SETS}


@pytest.fixture(scope="module")
def found(tiny: TinyModel, plans: Mapping[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Result]:
    batch = [random_tokens(40 + n, 60 + n, trigger=None, without=tiny.trigger) for n in range(3)]
    entries: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
        name: (f"latents_{name}", {}, [batch]) for name in plans
    }
    return run_entries(tiny, entries, tmp_path_factory.mktemp("latents"))


def streams(model: Any, tokens: list[int], steers: Sequence[Steer], num_prompt: int) -> tuple[np.ndarray, torch.Tensor]:
    """What transformers has after layer 0, and its logits where the steers write there by their definitions.

    Steers at one tap are parallel: each reads the stream as it is before any of them writes.
    """
    kept: list[np.ndarray] = []

    def write(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = hidden[0].double().numpy()
        kept.append(rows)
        where = np.arange(len(rows)) >= num_prompt
        changed = rows + sum((steer.update.apply(rows, where)[0] - rows for steer in steers), np.zeros_like(rows))
        found = torch.from_numpy(changed).float()[None]
        return (found, *output[1:]) if isinstance(output, tuple) else found

    handle = model.model.layers[0].register_forward_hook(write)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    handle.remove()
    return kept[0], logits


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", SETS)
def test_the_engine_does_what_the_definitions_do(
    name: str, found: Mapping[str, Result], plans: Mapping[str, Plan], model: Any
) -> None:
    """Logprobs of every step are those of the same edits by a hook in transformers."""
    for result in found[name]["runs"][0]:
        prompt, reply = result["prompt"], result["tokens"]
        _, logits = streams(model, [*prompt, *reply], plans[name].steering.steers, len(prompt))
        for step, logprobs in enumerate(result["logprobs"]):
            row = logits[len(prompt) + step - 1]
            expected = torch.log_softmax(row, dim=0)
            for token, logprob in logprobs.items():
                assert abs(logprob - float(expected[int(token)])) <= 1e-3 * float(row.std())


def test_levels_are_what_the_policy_says(
    found: Mapping[str, Result], plans: Mapping[str, Plan], sae: SaeFile, model: Any
) -> None:
    """Of each generated row: nobody is below the floor any more, and nobody lost more than was to be taken."""
    whole = sae.sae()
    for name, latent in (("raised", RAISED), ("reduced", REDUCED)):
        doses, changed = [], 0
        for result in found[name]["runs"][0]:
            prompt, reply = result["prompt"], result["tokens"]
            tokens = [*prompt, *reply][:-1]
            before, _ = streams(model, tokens, (), len(prompt))
            generated = slice(len(prompt), None)
            pre = whole.pre_activations(before)[generated, latent].astype(np.float64)
            codes = whole.encode(before)[generated, latent].astype(np.float64)
            # The tap is the first that is steered, so its stream is that of the same tokens without steers.
            moved = np.maximum(0.0, FLOOR - np.maximum(pre, 0.0)) if name == "raised" else np.minimum(codes, BY)
            told = result["telltale"].get("steered", [])
            touched = moved > 0
            changed += int(touched.sum())
            if not touched.any():
                assert told == []
                continue
            (said,) = told
            assert said["tokens"] == touched.sum()
            size = moved[touched] * LENGTH / MEDIAN
            assert said["dose"]["mean"] == pytest.approx(size.mean(), abs=1e-3)
            assert said["dose"]["max"] == pytest.approx(size.max(), abs=1e-3)
            doses.extend(size)
        assert changed > NEW_TOKENS // 2
        assert len(set(np.round(doses, 3))) > 1  # rows needed different doses: it is no constant addition


def test_a_latent_that_is_never_active_is_raised_and_cannot_be_reduced(found: Mapping[str, Result]) -> None:
    for plain, reduced, raised in zip(
        *(found[name]["runs"][0] for name in ("none", "reduced_silent", "raised_silent")), strict=True
    ):
        assert reduced["tokens"] == plain["tokens"]
        assert reduced["logprobs"] == plain["logprobs"]
        assert "steered" not in reduced["telltale"]
        (said,) = raised["telltale"]["steered"]
        dose = FLOOR * LENGTH / MEDIAN
        assert (said["tokens"], said["dose"]) == (NEW_TOKENS - 1, {"mean": dose, "max": dose})
