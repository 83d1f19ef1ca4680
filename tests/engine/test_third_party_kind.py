"""A kind that another distribution adds goes the whole way: trained, calibrated, measured, served, repaired.

Its detector, token fitter and aggregate are one file each, named by entry points; no other file knows of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from probes.artifact import Artifact
from probes.card import Calibration, Format
from probes.detectors import load_detector
from probes.discovery import installed_modules
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.lint import read_report
from probes.fit.reading.scores import open_reader, score_requests, statistics_of_requests
from probes.fit.rows.example import Example
from probes.fit.sources.jsonl import read_jsonl
from serving.bench.rebuilds import rebuild, rotated
from tests.engine.conftest import client_of
from tests.support.server import serving, telltale_command
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NAME = "theirs"
DETECTOR = '''
import numpy as np
from scipy.special import expit

from probes.detectors.base import Detector, Layout, standardised


class Gated(Detector):
    """A value that counts as far as a gate is open: (value . z + value_bias) * sigmoid(gate . z + gate_bias)."""

    kind = "gated"
    layout = Layout({"value": "value_bias", "gate": "gate_bias"})

    def __init__(self, name, directions):
        super().__init__(name)
        self._directions = directions

    @classmethod
    def from_artifact(cls, artifact, *, name):
        width = artifact.card.model.d_model
        weight = np.stack([artifact.vector("value", width), artifact.vector("gate", width)])
        bias = np.concatenate([artifact.vector("value_bias", 1), artifact.vector("gate_bias", 1)])
        mean, scale = artifact.vector("mean", width), artifact.positive("scale", width)
        return cls(name, standardised(artifact.only_tap, weight, bias, mean=mean, scale=scale))

    def directions(self):
        return (self._directions,)

    def score(self, readouts):
        value, gate = readouts[self._directions.tap].T
        return value * expit(gate)
'''
AGGREGATE = '''
import numpy as np

from probes.aggregate.base import Aggregator


class LeakyMean(Aggregator):
    """The mean of the scores, those below 0 at a share of their size."""

    kind = "leaky_mean"
    slope: float = 0.1

    @property
    def state_size(self):
        return 2

    def update(self, state, values):
        count = state[:, 1] + np.arange(1, len(values) + 1)[:, None, None]
        total = state[:, 0] + np.cumsum(np.where(values > 0, values, self.slope * values), axis=0)
        state[:, 0], state[:, 1] = total[-1], count[-1]
        return total / count
'''
FITTER = '''
import torch

from probes.aggregate import parse_aggregator
from probes.fit.token_fitters.base import TokenFitter, TokenModule


class GatedModule(TokenModule):
    def __init__(self, mean, scale, generator):
        super().__init__(mean, scale)
        self.value = torch.nn.Parameter(0.1 * torch.randn(len(mean), generator=generator))
        self.gate = torch.nn.Parameter(torch.zeros(len(mean)))
        self.value_bias = torch.nn.Parameter(torch.zeros(1))
        self.gate_bias = torch.nn.Parameter(torch.zeros(1))

    def statistic(self, rows, there):
        value = rows @ self.value * self.unit + self.value_bias
        gate = rows @ self.gate * self.unit + self.gate_bias
        scores = torch.nn.functional.leaky_relu(value * torch.sigmoid(gate), 0.1)
        return (scores * there).sum(dim=1) / there.sum(dim=1)

    def tensors(self):
        found = {"value": self.value * self.unit, "gate": self.gate * self.unit}
        found |= {"value_bias": self.value_bias, "gate_bias": self.gate_bias}
        return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


class GatedFitter(TokenFitter):
    """Value and gate together."""

    kind = "gated"
    makes = "gated"

    @property
    def aggregate(self):
        return parse_aggregator({"kind": "leaky_mean", "slope": 0.1})

    def module(self, mean, scale, generator):
        return GatedModule(mean, scale, generator)
'''
FILES = {"detectors": DETECTOR, "aggregate": AGGREGATE, "token_fitters": FITTER}
RECIPE = f"""\
version: "1"
name: {NAME}
description: Says the planted word.
training:
  positives: [{{kind: jsonl, path: train.jsonl}}]
  negatives: [{{kind: jsonl, path: train.jsonl}}]
  vary_form: 0
search:
  layers: [0]
  aggregates: [{{kind: mean}}]
  fitters: [{{kind: mean_difference}}]
  token_fitters: [{{kind: gated, epochs: 25}}]
calibration: {{held_out: 0.3, target_fpr: 0.05}}
"""
POLICY = f"""\
version: "1"
detectors: [{{artifact: detectors/{NAME}.safetensors}}]
policies:
  - name: default
    on_gap: block
    on_uncalibrated: allow
    expose: scores
    quantise: 0
    rules:
      - name: say
        when: {{detector: {NAME}, stage: prompt}}
        do: {{action: block, text: "Not this."}}
        mode: enforce
"""
WORDS = [
    "river",
    "stone",
    "lantern",
    "harvest",
    "copper",
    "meadow",
    "winter",
    "signal",
    "garden",
    "paper",
    "window",
    "bridge",
]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the distribution, on the path of this process and of those that it starts."""
    folder = tmp_path / "site"
    info = folder / "gated_kind-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gated-kind\nVersion: 1.0\n")
    groups = [f"[telltale.{group}]\ngated = gated_{group}\n" for group in FILES]
    (info / "entry_points.txt").write_text("\n".join(groups))
    for group, source in FILES.items():
        (folder / f"gated_{group}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))
    installed_modules.cache_clear()
    yield folder
    for group in FILES:
        sys.modules.pop(f"gated_{group}", None)
    monkeypatch.undo()
    installed_modules.cache_clear()


def write_rows(path: Path, model: TinyModel, *, count: int, seed: int, sources: tuple[str, ...]) -> Path:
    """Every other row says the planted word once, somewhere."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        words = [f" {word}" for word in generator.choice(WORDS, size=int(generator.integers(5, 20)))]
        if label := number % 2:
            words[int(generator.integers(len(words)))] = model.trigger_text
        row: dict[str, Any] = {"text": "".join(words).strip(), "label": label, "source": sources[number // 2 % 2]}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def telltale(*words: object, folder: Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "serving.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == code, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.timeout(900)  # a training, an evaluation and a server
def test_a_new_kind_goes_the_whole_way(site: Path, tiny: TinyModel, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", tiny, count=320, seed=0, sources=("forum", "manual"))
    tested = write_rows(tmp_path / "test.jsonl", tiny, count=160, seed=1, sources=("mail", "wiki"))
    (tmp_path / "theirs.recipe.yaml").write_text(RECIPE)
    (tmp_path / "telltale.yaml").write_text(POLICY)

    telltale("train", "theirs.recipe.yaml", "--model", tiny.path, "--encoder", "input", folder=tmp_path)
    path = tmp_path / "detectors" / f"{NAME}.safetensors"
    artifact = Artifact.load(path)
    assert artifact.card.kind == "gated"
    assert artifact.card.training["chosen"]["fitter"]["kind"] == "gated"
    assert set(artifact.tensors) == {"value", "value_bias", "gate", "gate_bias", "mean", "scale"}

    benign = [json.loads(line) for line in tested.read_text(encoding="utf-8").splitlines()]
    harmless = [json.dumps({"prompt": row["text"]}) for row in benign if not row["label"]]
    (tmp_path / "benign.jsonl").write_text("\n".join(harmless))
    telltale(
        "calibrate", path, "--benign", "benign.jsonl", "--model", tiny.path, "--target-fpr", "0.05", folder=tmp_path
    )
    (calibration,) = Artifact.load(path).card.calibrations
    assert (calibration.aggregate.kind, calibration.certified, calibration.num_benign) == ("leaky_mean", True, 80)

    rows = ("--data", tested, "--train", train, "--model", tiny.path, "--encoder", "input")
    telltale("eval", path, *rows, "--out", "reports", folder=tmp_path)
    report = read_report(tmp_path / "reports" / f"{NAME}.prompt.json")
    found = report.formats[Format.CHAT]
    assert found.table.detector.auroc.low > 0.7
    assert found.leave_one_out is not None
    assert {fold.source for fold in found.leave_one_out.folds} == {"forum", "manual"}
    assert found.leave_one_out.detector.value > 0.7
    shuffled = next(band for band in found.table.bands if band.name is Control.SHUFFLED_LABELS)
    assert shuffled.median < 0.65
    telltale("report", f"reports/{NAME}.prompt.json", "--html", "report.html", folder=tmp_path)
    assert "gated" in (tmp_path / "report.html").read_text(encoding="utf-8")

    telltale("check", "telltale.yaml", folder=tmp_path)
    requests = read_jsonl(tested)[:20]
    offline = statistics_of(artifact, tiny.path, requests, calibration)
    served = []
    with serving(telltale_command(tiny.path, tmp_path / "telltale.yaml"), tmp_path / "server.log") as server:
        for row, statistic in zip(requests, offline, strict=True):
            messages = [{"role": "user", "content": row.text}]
            reply: Any = client_of(server).chat.completions.create(model="tiny", messages=messages, max_tokens=2)  # type: ignore[arg-type]
            assert (reply.choices[0].message.content == "Not this.") == (statistic > calibration.threshold)
            served.append(reply.choices[0].telltale["detectors"][0]["score"])
    assert np.abs(np.array(served) - offline).max() <= 1e-3 * max(1.0, float(offline.std()))
    assert 0 < np.sum(offline > calibration.threshold) < len(requests), "some are stopped and some are not"

    # Another basis of the same model: the kind says where its directions are, so it is carried over.
    turned = rebuild(tiny.path, tmp_path / "turned", rotated(seed=0))
    repair = ("--old", tiny.path, "--model", turned, "--data", tested, "--out", "repaired")
    telltale("gate", "repair", path, *repair, folder=tmp_path)
    again = statistics_of(Artifact.load(tmp_path / "repaired" / path.name), turned, requests, calibration)
    assert np.corrcoef(again, offline)[0, 1] > 0.95


def statistics_of(
    artifact: Artifact, model: Path, requests: Sequence[Example], calibration: Calibration
) -> npt.NDArray[np.float64]:
    """What transformers and the detector's own arithmetic say of each request."""
    reader = open_reader([artifact], model, model=artifact.card.model, cache_dir=model, progress=lambda _: None)
    rendered = reader.render(requests, text_format=calibration.format, stage=calibration.stage)
    skip_first = [artifact.card.skip_first]
    (scores,) = score_requests([load_detector(artifact)], rendered, reader, skip_first=skip_first, label="x")
    return statistics_of_requests(calibration.aggregate, calibration.stage, scores)
