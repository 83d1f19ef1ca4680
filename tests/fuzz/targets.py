"""What is fuzzed: readers, valid files for each, and how they are read. They refuse with our own errors alone."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from probes.artifact import Artifact, card_path_of, save_tensors
from probes.detectors import load_detector
from probes.errors import TelltaleError
from probes.sae.file import load_sae
from probes.sae.layouts import Stated, read_layout
from probes.steering.artifact import SteerArtifact, save_steer
from tests.fuzz.edits import Files, damaged
from tests.support.kinds import LAYERS, MAKE
from tests.unit.artifacts import make_card
from tests.unit.saes import random_sae, stored_sae
from tests.unit.test_steers import direction

ARTIFACT, CARD = "a.safetensors", "a.card.json"
SAELENS = Path(__file__).parents[1] / "data/saelens"
WIDTH = 8


@dataclass
class Target:
    """A reader.

    Attributes:
        name: on the command line, and of the folder with its findings.
        make: valid files, several times.
        read: reads the files in a folder.
        settle: what is put right in changed files, so that the fuzzer gets past digests.
    """

    name: str
    make: Callable[[], Sequence[Files]]
    read: Callable[[Path], object]
    settle: Callable[[dict[str, bytes]], None] = lambda files: None

    @cached_property
    def bases(self) -> Sequence[Files]:
        """Valid files."""
        return self.make()

    def run(self, data: bytes) -> str:
        """Read the files that ``data`` stands for.

        Returns: the message with which they were refused, empty if they were read.
        """
        files = damaged(self.bases, data)
        self.settle(files)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            try:
                self.read(Path(folder))
            except TelltaleError as error:
                assert str(error)
                return str(error)
        return ""


def _in(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _detectors() -> list[Files]:
    found = []
    for kind in sorted(MAKE):
        with tempfile.TemporaryDirectory() as folder:
            tensors = MAKE[kind](np.random.default_rng(1), WIDTH)
            save_tensors(Path(folder) / ARTIFACT, make_card(kind=kind, layers=LAYERS.get(kind, (0,))), tensors)
            found.append(_in(Path(folder)))
    return found


def _read_detector(folder: Path) -> None:
    detector = load_detector(Artifact.load(folder / ARTIFACT))
    detector.score(detector.read({item.tap: np.ones((2, len(item.weight))) for item in detector.directions()}))


def _right_digest(files: dict[str, bytes]) -> None:
    try:
        card = json.loads(files[CARD])
    except (ValueError, RecursionError):
        return
    if isinstance(card, dict) and "tensors_digest" in card:
        card["tensors_digest"] = hashlib.sha256(files[ARTIFACT]).hexdigest()
        files[CARD] = json.dumps(card).encode()


def _saes_of_ours() -> list[Files]:
    found = []
    for seed in range(2):
        stored = stored_sae(random_sae(seed))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ARTIFACT
            save_tensors(path, stored.card, stored.tensors)
            assert card_path_of(path).name == CARD
            found.append(_in(Path(folder)))
    return found


def _read_sae(folder: Path) -> None:
    load_sae(folder / ARTIFACT).sae().encode(np.linspace(1, 2, WIDTH, dtype=np.float32)[None])


def _steers() -> list[Files]:
    with tempfile.TemporaryDirectory() as folder:
        save_steer(Path(folder) / ARTIFACT, direction(), np.eye(WIDTH)[0])
        return [_in(Path(folder))]


def _read_steer(folder: Path) -> None:
    steer = SteerArtifact.load(folder / ARTIFACT)
    _ = steer.tap, steer.steering_vector(), steer.skip_first


def _layouts() -> list[Files]:
    rng = np.random.default_rng(0)
    encoder, decoder = rng.normal(size=(2, 3, WIDTH)).astype(np.float32)
    bias, other = rng.normal(size=3).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)
    found: list[Files] = [
        {name: content for name, content in _in(folder).items() if name != "expected.safetensors"}
        for folder in sorted(SAELENS.iterdir())
        if folder.is_dir()
    ]
    packed = io.BytesIO()
    np.savez(packed, W_enc=encoder.T, W_dec=decoder, b_enc=bias, b_dec=other, threshold=np.abs(bias))
    found.append({"gemma-scope-2b-pt-res/layer_20/params.npz": packed.getvalue()})
    sparsify = {"encoder.weight": encoder, "encoder.bias": bias, "W_dec": decoder, "b_dec": other}
    config = {"d_in": WIDTH, "num_latents": 3, "k": 2, "activation": "topk", "normalize_decoder": True}
    found.append({"layers.15/cfg.json": json.dumps(config).encode(), "layers.15/sae.safetensors": save(sparsify)})
    for kind in ("AutoEncoder", "BatchTopKSAE"):
        state = {
            "encoder.weight": encoder, "decoder.weight": decoder.T.copy(), "encoder.bias": bias, "bias": other,
            "b_dec": other, "threshold": np.float32(0.5),
        }  # fmt: skip
        saved = io.BytesIO()
        torch.save({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}, saved)
        trainer = {"dict_class": kind, "layer": 8, "lm_name": "m", "submodule_name": "resid_post_layer_8", "k": 2}
        found.append({"ae.pt": saved.getvalue(), "config.json": json.dumps({"trainer": trainer}).encode()})
    return found


def _read_layout(folder: Path) -> None:
    within = folder
    while not any(path.is_file() for path in within.iterdir()):
        (within,) = within.iterdir()
    found = read_layout(within, Stated())
    found.sae.encode(np.linspace(1, 2, found.sae.d_model, dtype=np.float32)[None])


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("detector", _detectors, _read_detector, _right_digest),
        Target("sae", _saes_of_ours, _read_sae, _right_digest),
        Target("steer", _steers, _read_steer, _right_digest),
        Target("layout", _layouts, _read_layout),
    )
}
"""By name."""
