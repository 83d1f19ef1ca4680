"""Every architecture of the registry: its taps read what transformers computes, and what is wrong is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.taps import Site, Tap
from serving.engine.layers import supported_architectures
from tests.engine.capture import NEW_TOKENS
from tests.support.architectures import D_MODEL, NUM_LAYERS, RECIPES, VOCABULARY, reference, write_tiny
from tests.support.tiny import save_linear
from tests.support.written import DOSE, edited

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900, func_only=True)]

TOKENS = np.random.default_rng(3).integers(3, VOCABULARY, size=40).tolist()
LONG = np.random.default_rng(4).integers(3, VOCABULARY, size=300).tolist()
TAPS = [Tap(layer, site) for layer in range(NUM_LAYERS) for site in Site]
BIAS = 0.25
QUICK = [name for name, recipe in RECIPES.items() if recipe.engine]
ALL_LAYERS_SLIDE = {"MistralForCausalLM"}
REST = [name for name in RECIPES if name not in QUICK]
TOLERANCE = 1e-3


class Tiny:
    """Tiny models on disk, each with a policy of one random direction at every tap."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(7)
        self.directions = {tap: generator.normal(size=D_MODEL) / np.sqrt(D_MODEL) for tap in TAPS}
        self.paths: dict[str, Path] = {}

    def model(self, name: str) -> Path:
        if name not in self.paths:
            self.paths[name] = write_tiny(self.folder, name)
        return self.paths[name]

    def policy(self, name: str) -> Path:
        home = self.folder / f"{name}-policy"
        home.mkdir(exist_ok=True)
        for tap, direction in self.directions.items():
            label = str(tap).replace(".", "_")
            save_linear(
                home / f"{label}.safetensors", self.model(name), name=label, direction=direction, layer=tap.layer,
                site=tap.site, threshold=1e9, bias=BIAS,
            )  # fmt: skip
        entries = "\n".join(f"  - artifact: {str(tap).replace('.', '_')}.safetensors" for tap in TAPS)
        rule = "{name: watch, when: {detector: mlp_out_1, stage: prompt}, do: {action: flag}, mode: enforce}"
        path = home / "policy.yaml"
        path.write_text(
            f'version: "1"\ndetectors:\n{entries}\npolicies:\n'
            f"  - {{name: default, on_gap: block, on_uncalibrated: allow, rules: [{rule}]}}\n"
        )
        return path

    def run(self, out: str, *, models: Iterable[str], engines: Iterable[str]) -> dict[str, np.ndarray]:
        asked = {
            "models": {name: str(self.model(name)) for name in models},
            "engines": {name: [str(self.model(name)), str(self.policy(name))] for name in engines},
            "tokens": TOKENS,
            "long": LONG,
        }
        command = [sys.executable, "-m", "tests.engine.architecture_run", str(self.folder / out)]
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            # Cohere's norm compiles itself, even in eager mode: ten seconds for nothing that is tested here.
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(self.folder / out) as saved:
            return dict(saved)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def read(tiny: Tiny) -> dict[str, np.ndarray]:
    return tiny.run("quick.npz", models=RECIPES, engines=QUICK)


@pytest.fixture(scope="module")
def read_slowly(tiny: Tiny) -> dict[str, np.ndarray]:
    return tiny.run("slow.npz", models=(), engines=REST)


@pytest.fixture(scope="module")
def said(read: dict[str, np.ndarray]) -> dict[str, Any]:
    return dict(json.loads(str(read["said"])))


def test_every_architecture_has_a_recipe() -> None:
    assert set(RECIPES) == set(supported_architectures())


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_has_the_effect_of_a_hook_in_transformers(
    name: str, tiny: Tiny, read: dict[str, np.ndarray]
) -> None:
    # Another last token: the prompt must not come out of the prefix cache.
    tokens = [*TOKENS[:-1], TOKENS[-1] + 1]
    plain, expected = (reference(tiny.model(name), name, tokens, edit=edit) for edit in (None, edited))
    last = Tap(NUM_LAYERS - 1)
    for (site, layer), value in expected.items():
        if layer == 0:
            continue  # reads come before writes
        readout = read[f"{name}.steered.{Tap(layer, site)}"]
        assert np.all(np.abs(readout[:, :-1] - value) <= TOLERANCE * value.std()), (site, layer)
    moved = expected[last.site, last.layer] - plain[last.site, last.layer]
    assert np.abs(moved[1:]).max() > 100 * TOLERANCE * plain[last.site, last.layer].std()
    doses = read[f"{name}.doses"]
    assert np.all(doses[0] == 0)
    np.testing.assert_allclose(doses[1:, 0], DOSE, rtol=1e-6)


@pytest.mark.covers("each architecture", "readouts equal transformers")
@pytest.mark.parametrize("name", RECIPES)
def test_taps_read_what_transformers_computes(name: str, tiny: Tiny, read: dict[str, np.ndarray]) -> None:
    expected = reference(tiny.model(name), name, TOKENS)
    assert len(expected) == len(TAPS)
    for (site, layer), value in expected.items():
        readout = read[f"{name}.{Tap(layer, site)}"]
        assert np.all(np.abs(readout[:, :-1] - value) <= TOLERANCE * value.std()), (site, layer)
        np.testing.assert_allclose(readout[:, -1], (value**2).sum(axis=1), rtol=1e-3)
    # The three sites differ, so that none can stand for another.
    for layer in range(NUM_LAYERS):
        values = [expected[site, layer] for site in Site]
        assert min(np.abs(a - b).max() for a, b in ((values[0], values[1]), (values[1], values[2]))) > 0.1
    assert int(read[f"{name}.fired_by_the_check"]) == 0
    assert read[f"{name}.fired"].tolist() == [1] * len(TAPS)


def compare_engine(name: str, tiny: Tiny, saved: dict[str, np.ndarray]) -> None:
    """A short prompt, a long one, and the long one again, whose first blocks come out of the prefix cache."""
    for number, prompt in enumerate((TOKENS, LONG, LONG)):
        compare_run(f"{name}.{number}", prompt, name, tiny, saved)
    replayed = [int(saved[f"{name}.{number}.replayed"]) for number in range(3)]
    # Layers that all slide keep no block for every token: then nothing is taken out of the cache.
    assert replayed == [0, 0, 0 if name in ALL_LAYERS_SLIDE else 256]


def compare_run(run: str, prompt: list[int], name: str, tiny: Tiny, saved: dict[str, np.ndarray]) -> None:
    tokens = saved[f"{run}.0.tokens"].tolist()
    assert tokens[: len(prompt)] == prompt
    assert len(tokens) == len(prompt) + NEW_TOKENS
    assert saved[f"{run}.0.positions"].tolist() == list(range(len(tokens) - 1))
    columns = json.loads(str(saved[f"{name}.columns"]))
    readouts = saved[f"{run}.0.readouts"]
    expected = reference(tiny.model(name), name, tokens[:-1])
    for tap, direction in tiny.directions.items():
        value = expected[tap.site, tap.layer] @ direction + BIAS
        norm, index = columns[str(tap)]
        assert np.all(np.abs(readouts[:, index] - value) <= TOLERANCE * value.std()), str(tap)
        np.testing.assert_allclose(readouts[:, norm], (expected[tap.site, tap.layer] ** 2).sum(axis=1), rtol=1e-3)


@pytest.mark.covers("each architecture", "readouts equal transformers")
@pytest.mark.covers("each architecture", "every position accounted for")
@pytest.mark.parametrize("name", QUICK)
def test_a_monitored_engine_reads_what_transformers_computes(
    name: str, tiny: Tiny, read: dict[str, np.ndarray]
) -> None:
    compare_engine(name, tiny, read)


@pytest.mark.covers("each architecture", "readouts equal transformers")
@pytest.mark.covers("each architecture", "every position accounted for")
@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_a_monitored_engine_of_any_other_architecture(
    name: str, tiny: Tiny, read_slowly: dict[str, np.ndarray]
) -> None:
    compare_engine(name, tiny, read_slowly)


@pytest.mark.covers("layer convention that is wrong", "noticed")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stream without its residual", ["resid_post.0", "LlamaDecoderLayer", "'stale'", "layer 1 takes"]),
        ("doubled residual", ["resid_post.0", "CohereDecoderLayer", "'fused'", "layer 1 takes"]),
        ("partial sums", ["resid_post.0", "layer 1 takes"]),
        ("partial attention", ["attn_out.0", "partial sum"]),
        ("split rows", ["resid_post.0", "of 7 tokens it read 4"]),
        ("norm that is never called", ["never called", "all-reduce"]),
        ("bound forward", ["bound to the instance"]),
        ("last layer of a stage", ["resid_post.1", "behind layer 1"]),
        ("wrong shape", ["Tensor", "'alone'"]),
        ("forgotten multiplier", ["mlp_out.0", "multiplier"]),
        ("forgotten norm", ["attn_out.0", "norm"]),
    ],
)
def test_the_start_up_check_notices(fault: str, words: list[str], said: dict[str, Any]) -> None:
    assert [word for word in words if word not in said[fault]] == []
    assert said[f"after {fault}"] == "passed"


def test_a_pipeline_stage_holds_its_own_taps(said: dict[str, Any]) -> None:
    step = D_MODEL + 1
    for name, layers in (("stage 0-2", (0, 1)), ("stage 2-3", (2,))):
        assert said[f"{name} verdict"] == "passed"
        mine = [tap for tap in sorted(TAPS) if tap.layer in layers]
        assert said[f"{name} taps"] == [str(tap) for tap in mine]
        assert said[f"{name} absent"] == [str(tap) for tap in sorted(TAPS) if tap.layer not in layers]
        places = [sorted(TAPS).index(tap) for tap in mine]
        assert said[f"{name} columns"] == [[place * step, (place + 1) * step] for place in places]
        row = np.array(said[f"{name} row"]).reshape(len(TAPS), step)
        assert np.all(row[places] == 1.0)
        # NaN where nothing was read here: what never comes from the stage before is a gap, not a zero.
        assert np.all(np.isnan(np.delete(row, places, axis=0)))
