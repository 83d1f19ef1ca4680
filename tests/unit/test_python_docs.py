"""The examples of docs/python.md run as they stand, on the embedded model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from probes.artifact import Artifact

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
@pytest.mark.engine
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)  # noqa: S102 - our own document
    artifact = Artifact.load(tmp_path / "detectors" / "shouting.safetensors")
    assert (artifact.card.kind, artifact.card.taps) == ("linear", ("resid_post.12",))
    (calibration,) = artifact.card.calibrations
    assert not calibration.certified
    probe = names["probe"]
    low, high = probe.decision_function([names["english"][7], names["shouted"][7]])  # type: ignore[attr-defined, index]
    assert high > low
    assert names["several"].predict([names["shouted"][7]]).tolist() == [1]  # type: ignore[attr-defined, index]
