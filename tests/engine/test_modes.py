"""Every token of every request is scored, once and rightly, in every mode in which people run the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.modes import BLOCK, LENGTHS
from tests.support.tiny import D_MODEL, NUM_LAYERS, TinyModel, save_linear

pytestmark = pytest.mark.engine

HERE = ("whole", "chunked", "cold", "preempted", "ngram", "async_base")
"""Modes of one process: their engines run after each other in it."""
SLOW = ("tensor_parallel", "pipeline_parallel", "compiled", "pipeline_compiled")
MODES = (
    *HERE,
    *(pytest.param(mode, marks=[pytest.mark.slow, pytest.mark.timeout(600)]) for mode in SLOW),
)
ROWS = {
    "whole": "whole prompts",
    "chunked": "chunked prefill",
    "cold": "cold prefix cache",
    "preempted": "preemption",
    "ngram": "ngram drafts",
    "async_base": "asynchronous scheduler",
}
"""The quick modes as docs/coverage.md calls them."""
SLOW_ROWS = {
    "tensor_parallel": "tensor parallel",
    "pipeline_parallel": "pipeline parallel",
    "compiled": "compiled",
    "pipeline_compiled": "pipeline parallel, compiled",
}
ALSO_ROWS = (
    "warm prefix cache",
    "synchronous scheduler",
    "one-token requests",
    "prompt logprobs",
    "n > 1",
    "raw prompts",
)
"""What the modes of one process contain besides."""
REQUESTS = ("batch", "again", "crowd", "one_token", "prompt_logprobs", "few_words", "three_choices")
DIRECTIONS = 3
BIAS = 0.25


class Watched:
    """The tiny model with random directions at both layers, watched by rules that never fire."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.directions: dict[str, np.ndarray] = {}
        self._found: dict[str, Any] = {}
        generator = np.random.default_rng(7)
        for layer in range(NUM_LAYERS):
            for number in range(DIRECTIONS):
                direction = generator.normal(size=D_MODEL)
                name = f"d{layer}_{number}"
                self.directions[name] = direction / np.linalg.norm(direction)
                save_linear(
                    folder / f"{name}.safetensors", model, name=name, direction=self.directions[name], layer=layer,
                    threshold=1e9, bias=BIAS,
                )  # fmt: skip
        entries = "\n".join(f"  - artifact: {name}.safetensors" for name in self.directions)
        rules = ", ".join(
            f"{{name: {stage}, when: {{detector: {detector}, stage: {stage}}}, do: {{action: block}}, mode: enforce}}"
            for detector, stage in (("d0_0", "stream"), ("d1_0", "prompt"))
        )
        (folder / "policy.yaml").write_text(
            f'version: "1"\ndetectors:\n{entries}\npolicies:\n'
            f"  - {{name: default, on_gap: block, on_uncalibrated: allow, hold_back: 1, rules: [{rules}]}}\n"
        )
        self._network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def found(self, mode: str) -> dict[str, Any]:
        """What the monitor of this mode's engine saw."""
        if mode not in self._found:
            self._run(HERE if mode in HERE else (mode,))
        return self._found[mode]

    def _run(self, modes: tuple[str, ...]) -> None:
        out = self.folder / f"{modes[0]}.json"
        subprocess.run(
            [sys.executable, "-m", "tests.engine.modes", self.model, self.folder / "policy.yaml", out, *modes],
            check=True,
            cwd=Path(__file__).parents[2],
        )
        self._found |= json.loads(out.read_text())

    def streams(self, tokens: list[int]) -> list[np.ndarray]:
        """transformers' residual stream after each layer, (positions, d_model) float64."""
        last: list[torch.Tensor] = []
        layer = self._network.model.layers[-1]
        hook = layer.register_forward_hook(
            lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.inference_mode():
            states = self._network(torch.tensor(tokens)[None], output_hidden_states=True).hidden_states
        hook.remove()
        # hidden_states' last entry is normed: the last layer comes from the hook.
        streams = [*states[1:-1], last[0].reshape(states[0].shape)]
        return [stream[0].double().numpy() for stream in streams]

    def expected(self, tokens: list[int], name: str) -> np.ndarray:
        """Scores of one detector by transformers."""
        return np.asarray(self.streams(tokens)[int(name[1])] @ self.directions[name] + BIAS)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, tiny: TinyModel) -> Watched:
    return Watched(tmp_path_factory.mktemp("modes"), tiny.path)


def requests_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [request for name in REQUESTS for request in found["results"][name]]


@pytest.mark.parametrize("mode", MODES)
class TestEveryMode:
    @pytest.mark.covers(ROWS, "every position accounted for")
    @pytest.mark.covers(SLOW_ROWS, "every position accounted for", slow=True)
    @pytest.mark.covers(
        ["warm prefix cache", "synchronous scheduler", "one-token requests", "prompt logprobs", "n > 1", "raw prompts"],
        "every position accounted for",
    )
    def test_every_position_is_accounted_for_and_none_is_a_gap(self, watched: Watched, mode: str) -> None:
        for request in requests_of(watched.found(mode)):
            total = len(request["tokens"])
            # The last sampled token is never fed back.
            assert request["positions"] == list(range(total - 1))
            assert request["skipped"] == {"sink": 1, "final": 1}
            assert request["scored"] + 2 == request["total"] == total
            assert request["shown"] == [request["scored"], request["skipped"]]
            assert request["action"] == "allow"

    @pytest.mark.covers("abort", "every position accounted for")
    def test_a_request_that_is_cut_off_is_accounted_for(self, watched: Watched, mode: str) -> None:
        (request,) = watched.found(mode)["results"]["aborted"]
        assert set(request["skipped"]) <= {"sink", "final"}
        assert request["prompt"] <= request["scored"] + sum(request["skipped"].values()) == request["total"]
        assert request["positions"] == list(range(len(request["positions"])))

    @pytest.mark.covers(ROWS, "readouts equal transformers")
    @pytest.mark.covers(SLOW_ROWS, "readouts equal transformers", slow=True)
    @pytest.mark.covers(ALSO_ROWS, "readouts equal transformers")
    def test_readouts_equal_transformers(self, watched: Watched, mode: str) -> None:
        found = watched.found(mode)
        for request in requests_of(found):
            readouts = np.array(request["readouts"])
            streams = watched.streams(request["tokens"][:-1])
            for name, direction in watched.directions.items():
                layer = int(name[1])
                (column,) = found["columns"][name][f"resid_post.{layer}"]
                expected = streams[layer] @ direction + BIAS
                assert np.abs(readouts[:, column] - expected).max() <= 1e-3 * max(1.0, expected[1:].std())
            for layer, stream in enumerate(streams):
                norms = readouts[:, found["norms"][f"resid_post.{layer}"]]
                np.testing.assert_allclose(norms, (stream**2).sum(axis=1), rtol=1e-3)

    @pytest.mark.covers(ROWS, "statistics equal batch")
    @pytest.mark.covers(SLOW_ROWS, "statistics equal batch", slow=True)
    @pytest.mark.covers(ALSO_ROWS, "statistics equal batch")
    def test_statistics_are_those_of_the_whole_request(self, watched: Watched, mode: str) -> None:
        found = watched.found(mode)
        for request in requests_of(found):
            for number, (detector, stage) in enumerate(found["checks"]):
                scores = watched.expected(request["tokens"][:-1], detector)
                first = 1  # the sink
                # Of a raw prompt a stream rule reads all: nobody can say that it is not a reply which came back.
                read = scores[first : request["prompt"]] if stage == "prompt" else scores[first:]
                assert request["statistics"][number] == pytest.approx(
                    read.max(initial=-np.inf), abs=1e-3 * max(1.0, scores.std())
                )


class TestTheModesAreWhatTheySay:
    """A matrix proves nothing about a mode that did not happen."""

    @pytest.mark.covers("chunked prefill", "it really happens")
    def test_chunks(self, watched: Watched) -> None:
        assert watched.found("chunked")["events"]["steps"] > watched.found("whole")["events"]["steps"]

    @pytest.mark.covers(["cold prefix cache", "warm prefix cache"], "it really happens")
    def test_cached_prefixes(self, watched: Watched) -> None:
        def replayed(mode: str, name: str) -> list[int]:
            return [request["replayed"] for request in watched.found(mode)["results"][name]]

        whole_blocks = [length // BLOCK * BLOCK for length in LENGTHS]
        assert replayed("whole", "again") == [0, 0, 0, 0]
        # The last prompt begins as the one before it.
        assert replayed("cold", "batch") == [0, 0, 0, BLOCK]
        assert replayed("cold", "again") == whole_blocks

    @pytest.mark.covers("preemption", "it really happens")
    def test_preemptions(self, watched: Watched) -> None:
        found = watched.found("preempted")
        assert found["events"]["preemptions"] > 0
        assert any(request["repeated"] for request in found["results"]["crowd"])

    @pytest.mark.covers("ngram drafts", "it really happens")
    def test_drafts(self, watched: Watched) -> None:
        events = watched.found("ngram")["events"]
        assert events["accepted"] > 0
        assert events["rejected"] > 0

    @pytest.mark.covers(["synchronous scheduler", "asynchronous scheduler"], "it really happens")
    def test_the_asynchronous_scheduler(self, watched: Watched) -> None:
        assert "AsyncScheduler" in watched.found("async_base")["scheduler"]
        assert "AsyncScheduler" not in watched.found("cold")["scheduler"]

    @pytest.mark.covers(
        [
            "chunked prefill",
            "cold prefix cache",
            "warm prefix cache",
            "preemption",
            "ngram drafts",
            "asynchronous scheduler",
        ],
        "tokens unchanged",
    )
    def test_all_modes_said_the_same(self, watched: Watched) -> None:
        expected = [request["tokens"] for request in watched.found("whole")["results"]["batch"]]
        for mode in HERE:
            for name in ("batch", "again"):
                assert [request["tokens"] for request in watched.found(mode)["results"][name]] == expected
