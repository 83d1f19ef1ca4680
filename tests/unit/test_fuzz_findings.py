"""Readers of others' files: what a fuzzer found once stays refused, and a thousand random damages are."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from probes.sae.layouts import LayoutError, Stated, read_layout
from tests.fuzz.targets import TARGETS

FINDINGS = Path(__file__).parents[1] / "data/fuzz"
SEED, ROUNDS = 5, 300


def findings() -> list[Path]:
    return sorted(path for path in FINDINGS.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_valid_file_is_read(name: str) -> None:
    target = TARGETS[name]
    assert [target.run(bytes([number])) for number in range(len(target.bases))] == [""] * len(target.bases)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("path", findings(), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_is_read_or_refused(path: Path) -> None:
    TARGETS[path.parent.name].run(path.read_bytes())


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_random_damage_is_read_or_refused(name: str) -> None:
    chance = random.Random(SEED)  # noqa: S311 - no secret
    refused = [bool(TARGETS[name].run(chance.randbytes(chance.randint(1, 40)))) for _ in range(ROUNDS)]
    assert any(refused)
    assert not all(refused)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "params.npz", W_enc=np.zeros((4096, 2048), dtype=np.float32))
    assert zipfile.is_zipfile(tmp_path / "params.npz")
    with pytest.raises(LayoutError, match="times its size"):
        read_layout(tmp_path / "params.npz", Stated())
