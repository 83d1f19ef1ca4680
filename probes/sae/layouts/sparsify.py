"""EleutherAI's sparsify: a folder with ``cfg.json`` and ``sae.safetensors``, named after its hook point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from probes.sae.hook_point import tap_of_hook
from probes.sae.layouts.base import Found, Layout, LayoutError, Stated, agreed_tap, take
from probes.sae.sae import Activation, Sae
from probes.sae.tensors import read_json, read_safetensors

_CONFIG, _WEIGHTS, _RUN = "cfg.json", "sae.safetensors", "config.json"


class Sparsify(Layout):
    """TopK ones. The folder is named after the module whose output it reads: ``layers.15``, ``layers.15.mlp``.

    A transcoder of sparsify reads what goes *into* a module, which is no tap.
    """

    kind = "sparsify"
    files = "a folder with cfg.json and sae.safetensors"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """See ``Layout.fits``."""
        folder = _folder(path)
        return (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file()

    @classmethod
    def read(cls, path: Path, stated: Stated) -> Found:
        """See ``Layout.read``."""
        folder = _folder(path)
        where, weights = folder / _CONFIG, folder / _WEIGHTS
        config = read_json(where)
        _refuse_unserved(config, where)
        tensors = read_safetensors(weights)
        d_model, rank = (_positive(config, key, where) for key in ("d_in", "k"))
        width = config.get("num_latents") or d_model * _positive(config, "expansion_factor", where)
        run = read_json(folder.parent / _RUN) if (folder.parent / _RUN).is_file() else {}
        named = folder.resolve().name
        found = None if stated.tap is not None and not named.count("layers") else tap_of_hook(named, where=str(folder))
        sae = Sae.folded(
            tap=agreed_tap(found, stated, folder),
            activation=Activation.TOPK,
            encoder=take(tensors, "encoder.weight", (width, d_model), weights),
            encoder_bias=take(tensors, "encoder.bias", (width,), weights),
            decoder=take(tensors, "W_dec", (width, d_model), weights),
            decoder_bias=tensors.get("b_dec", np.zeros(d_model, dtype=np.float32)),
            subtracts_decoder_bias=True,
            input_factor=stated.input_factor or 1.0,
        )
        model, corpus = run.get("model"), run.get("dataset")
        return Found(
            sae,
            origin=f"sparsify, {named}, k = {rank}",
            rank=rank,
            model=str(model) if model else None,
            corpus=str(corpus) if corpus else None,
        )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _positive(config: dict[str, Any], key: str, where: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LayoutError(f"{where}: {key!r} is {value!r}; it must be a positive whole number.")
    return value


def _refuse_unserved(config: dict[str, Any], where: Path) -> None:
    if config.get("transcode") or config.get("skip_connection"):
        raise LayoutError(
            f"{where}: is a transcoder: it reads what goes into a module, behind a norm, which is no tap. Use an "
            "autoencoder on what a module returns."
        )
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        raise LayoutError(
            f"{where}: its activation is {'signed ' if config.get('signed') else ''}{activation}: whether a latent is "
            "active depends on others in a way that no threshold stands for. TopK is read."
        )
    for key in ("embed_skip", "gram_lookup"):
        if config.get(key):
            raise LayoutError(f"{where}: has {key}: its input is not what a tap reads. Use one without.")
