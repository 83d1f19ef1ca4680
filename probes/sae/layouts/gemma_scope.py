"""Gemma Scope: ``params.npz`` with the JumpReLU ones of Lieberum et al. 2024 (arXiv 2408.05147)."""

from __future__ import annotations

import re
from pathlib import Path

from probes.sae.layouts.base import Found, Layout, LayoutError, Stated, agreed_tap, take
from probes.sae.sae import Activation, Sae
from probes.sae.tensors import read_npz
from probes.taps import Tap

_FILE = "params.npz"
_LAYER = re.compile(r"layer_([0-9]+)")
_REPOSITORY = re.compile(r"gemma-scope-([a-z0-9.-]+?)-(res|mlp|att|transcoders)")
_MATRIX = 2
_ELSEWHERE = {
    "mlp": "what the MLP returns behind the norm that follows it; mlp_out is read before that norm",
    "att": "what the heads return before the output projection; attn_out is read behind it",
    "transcoders": "what goes into the MLP behind its norm, which is no tap",
}


class GemmaScope(Layout):
    """JumpReLU ones on the stream. The archive does not name model or layer: the folders above it do, if kept."""

    kind = "gemma_scope"
    files = "params.npz, or the folder that holds it"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """See ``Layout.fits``."""
        return _file(path).is_file() and _file(path).suffix == ".npz"

    @classmethod
    def read(cls, path: Path, stated: Stated) -> Found:
        """See ``Layout.read``."""
        file = _file(path)
        repository = _REPOSITORY.search(str(file.resolve()))
        if repository is not None and repository[2] in _ELSEWHERE:
            raise LayoutError(f"{file}: reads {_ELSEWHERE[repository[2]]}. Use one on the stream (gemma-scope-*-res).")
        if "embedding" in file.resolve().parts:
            raise LayoutError(f"{file}: reads the embeddings, which is no tap. Use one on the stream after a layer.")
        layers = {int(found[1]) for part in file.resolve().parts if (found := _LAYER.fullmatch(part))}
        if len(layers) > 1:
            raise LayoutError(f"{file}: the folders above it name the layers {sorted(layers)}. Say which with --tap.")
        tensors = {name.replace("w_", "W_"): value for name, value in read_npz(file).items()}
        encoder = tensors.get("W_enc")
        if encoder is None or encoder.ndim != _MATRIX:
            raise LayoutError(f"{file}: holds no matrix 'W_enc'; there are {sorted(tensors)}.")
        d_model, width = encoder.shape
        sae = Sae.folded(
            tap=agreed_tap(Tap(layers.pop()) if layers else None, stated, file),
            activation=Activation.JUMPRELU,
            encoder=encoder.T,
            encoder_bias=take(tensors, "b_enc", (width,), file),
            threshold=take(tensors, "threshold", (width,), file),
            decoder=take(tensors, "W_dec", (width, d_model), file),
            decoder_bias=take(tensors, "b_dec", (d_model,), file),
            input_factor=stated.input_factor or 1.0,
        )
        name = "/".join(part for part in file.resolve().parts[-4:-1] if re.match(r"layer_|width_|average_l0", part))
        known = repository is not None
        return Found(
            sae,
            origin=f"Gemma Scope{f', {name}' if name else ''}",
            model=f"gemma-2-{repository[1].removesuffix('-pt')}" if repository else None,
            corpus="the pretraining mixture of Gemma 1, as its authors state" if known else None,
        )


def _file(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path
