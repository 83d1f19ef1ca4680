"""dictionary_learning: ``ae.pt`` and ``config.json``. The file is read by torch without executing anything in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probes.errors import did_you_mean
from probes.sae.hook_point import tap_of_hook
from probes.sae.layouts.base import Found, Layout, LayoutError, Stated, agreed_tap, take
from probes.sae.sae import Activation, Sae
from probes.sae.tensors import Tensors, read_json, read_torch
from probes.taps import Tap

_FILE, _CONFIG = "ae.pt", "config.json"
_RELU = {"AutoEncoder", "AutoEncoderNew"}
_RANKED = {"AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"}
_KINDS = _RELU | _RANKED | {"GatedAutoEncoder", "JumpReluAutoEncoder"}
_SITES = {"resid_post": "", "attention": ".self_attn", "attn_out": ".self_attn", "mlp_out": ".mlp", "mlp": ".mlp"}
_MATRIX = 2


class DictionaryLearning(Layout):
    """ReLU, gated, JumpReLU, TopK, BatchTopK and Matryoshka ones.

    Codes are brought to decoder rows of length 1, as the library does by a default that differs between its versions;
    that of TopK, BatchTopK and Matryoshka ones have it from training. TopK ones hold a threshold too (a running mean of
    the smallest active value); it is not used, as ranks are what they are read with there: the threshold that stands
    for them is measured like that of any other.
    """

    kind = "dictionary_learning"
    files = "a folder with ae.pt and config.json"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """See ``Layout.fits``."""
        return (_folder(path) / _FILE).is_file()

    @classmethod
    def read(cls, path: Path, stated: Stated) -> Found:
        """See ``Layout.read``."""
        folder = _folder(path)
        where = folder / _CONFIG
        trainer = read_json(where).get("trainer") if where.is_file() else None
        if not isinstance(trainer, Mapping):
            raise LayoutError(
                f"{where}: is missing or has no 'trainer': what kind it is stands there alone. Copy it beside {_FILE}."
            )
        kind = str(trainer.get("dict_class"))
        if kind not in _KINDS:
            raise LayoutError(f"{where}: dict_class is {kind!r}. {did_you_mean(kind, _KINDS)}")
        tensors = read_torch(folder / _FILE)
        placed = {"tap": _tap(trainer, stated, where), "input_factor": stated.input_factor or 1.0}
        sae, rank = _build(kind, tensors, placed, trainer, folder)
        model = trainer.get("lm_name")
        return Found(
            sae,
            origin=f"dictionary_learning, {kind}",
            rank=rank,
            model=str(model) if model else None,
        )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _tap(trainer: Mapping[str, Any], stated: Stated, where: Path) -> Tap:
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    found = None
    if isinstance(layer, int):
        site = "resid_post" if name is None else str(name).rpartition("_layer")[0] or str(name)
        if site not in _SITES:
            raise LayoutError(
                f"{where}: reads the submodule {name!r}. {did_you_mean(site, _SITES)} Say where with --tap."
            )
        found = tap_of_hook(f"layers.{layer}{_SITES[site]}", where=str(where))
    return agreed_tap(found, stated, where)


def _build(
    kind: str, tensors: Tensors, placed: Mapping[str, Any], trainer: Mapping[str, Any], folder: Path
) -> tuple[Sae, int | None]:
    where = folder / _FILE
    wide = "W_enc" in tensors
    encoder = tensors["W_enc"].T if wide else tensors.get("encoder.weight")
    if encoder is None or encoder.ndim != _MATRIX:
        raise LayoutError(f"{where}: holds no encoder ('W_enc' or 'encoder.weight'); there are {sorted(tensors)}.")
    width, d_model = encoder.shape
    decoder = (
        take(tensors, "W_dec", (width, d_model), where)
        if wide
        else take(tensors, "decoder.weight", (d_model, width), where).T
    )
    bias_name = next((name for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in tensors), "b_dec")
    parts: dict[str, Any] = {
        **placed,
        "encoder": encoder,
        "decoder": decoder,
        "decoder_bias": take(tensors, bias_name, (d_model,), where),
        "subtracts_decoder_bias": kind not in {"AutoEncoderNew", "JumpReluAutoEncoder"},
    }
    norms = np.ones(width) if kind in _RANKED else np.linalg.norm(decoder.astype(np.float64), axis=1)
    parts["decoder"] = decoder / norms[:, None]
    if kind == "GatedAutoEncoder":
        names = {"gate_bias": "gate_bias", "log_gain": "r_mag", "magnitude_bias": "mag_bias"}
        vectors: dict[str, Any] = {key: take(tensors, name, (width,), where) for key, name in names.items()}
        vectors["log_gain"] = vectors["log_gain"] + np.log(norms)
        vectors["magnitude_bias"] = vectors["magnitude_bias"] * norms
        return Sae.gated(**parts, **vectors), None
    parts["encoder"] = encoder * norms[:, None]
    parts["encoder_bias"] = take(tensors, "b_enc" if wide else "encoder.bias", (width,), where) * norms
    if kind == "JumpReluAutoEncoder":
        threshold = take(tensors, "threshold", (width,), where) * norms
        return Sae.folded(**parts, activation=Activation.JUMPRELU, threshold=threshold), None
    if kind in _RELU:
        return Sae.folded(**parts, activation=Activation.RELU), None
    if kind == "AutoEncoderTopK":
        rank = trainer.get("k")
        if not isinstance(rank, int) or rank < 1:
            raise LayoutError(f"{folder / _CONFIG}: 'k' is {rank!r}; it must be a positive whole number.")
        return Sae.folded(**parts, activation=Activation.TOPK), rank
    single = float(take(tensors, "threshold", (), where))
    if single < 0:
        raise LayoutError(f"{where}: its threshold is {single:g}: training ended before one was found.")
    return Sae.folded(**parts, activation=Activation.BATCHTOPK, threshold=single), None
