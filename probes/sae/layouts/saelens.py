"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors`` (its versions 3 to 6)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probes.errors import did_you_mean
from probes.sae.hook_point import tap_of_hook
from probes.sae.layouts.base import Found, Layout, LayoutError, Stated, agreed_tap, take
from probes.sae.normalisation import Normalisation
from probes.sae.sae import Activation, Sae
from probes.sae.tensors import Tensors, object_in, read_json, read_safetensors

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_RANKED = {"topk", "batchtopk", "matryoshka_batchtopk"}
_JUMPING = {"jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"}
_KINDS = {"standard", "gated", "transcoder", "skip_transcoder"} | _RANKED | _JUMPING
_NORMALISATIONS = {"none": Normalisation.NONE, "constant_norm_rescale": Normalisation.RMS}
_NORMALISATIONS |= {"layer_norm": Normalisation.LAYER}
_SCALED = "expected_average_only_in"


class SaeLens(Layout):
    """Standard (ReLU), gated, JumpReLU, TopK, BatchTopK and Matryoshka ones, and transcoders.

    A BatchTopK or Matryoshka one that SAELens saved for inference is a JumpReLU one; its training checkpoints hold the
    threshold that it would have saved. Old files say less: what they leave out is what SAELens takes it to be.
    """

    kind = "saelens"
    files = "a folder with cfg.json and sae_weights.safetensors"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """See ``Layout.fits``."""
        folder = _folder(path)
        return (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file()

    @classmethod
    def read(cls, path: Path, stated: Stated) -> Found:
        """See ``Layout.read``."""
        folder = _folder(path)
        where = folder / _CONFIG
        config = read_json(where)
        told = {**config, **object_in(config, "metadata", where)}
        tensors = read_safetensors(folder / _WEIGHTS)
        kind = _architecture(told, where)
        transcodes = "transcoder" in kind
        tap, output = _taps(told, stated, where, transcodes=transcodes)
        width, d_model = _size(told, "d_sae", where), _size(told, "d_in", where)
        if transcodes and _size(told, "d_out", where) != d_model:
            raise LayoutError(f"{where}: d_out is {told['d_out']}, d_in {d_model}: a stream has one width.")
        _refuse_leftovers(told, tensors, where)
        parts: dict[str, Any] = {
            "tap": tap,
            "encoder": take(tensors, "W_enc", (d_model, width), folder / _WEIGHTS).T,
            "decoder": take(tensors, "W_dec", (width, d_model), folder / _WEIGHTS),
            "decoder_bias": take(tensors, "b_dec", (d_model,), folder / _WEIGHTS),
            "subtracts_decoder_bias": bool(told.get("apply_b_dec_to_input", True)) and not transcodes,
            **_scaling(told, stated, where),
        }
        if kind == "gated":
            names = {"gate_bias": "b_gate", "log_gain": "r_mag", "magnitude_bias": "b_mag"}
            vectors: dict[str, Any] = {
                key: take(tensors, name, (width,), folder / _WEIGHTS) for key, name in names.items()
            }
            sae, rank = Sae.gated(**parts, **vectors), None
        else:
            bias = take(tensors, "b_enc", (width,), folder / _WEIGHTS)
            sae, rank = _thresholded(kind, told, tensors, {**parts, "encoder_bias": bias, "output_tap": output}, folder)
        model, corpus = told.get("model_name"), told.get("dataset_path")
        version = told.get("sae_lens_version") or told.get("sae_lens_training_version")
        trained = told.get("training_architecture") or kind
        named = kind if trained == kind else f"{kind}, trained as {trained}"
        return Found(
            sae,
            origin=f"SAELens {version or 'of an unknown version'}, {named}",
            rank=rank,
            model=str(model) if model else None,
            corpus=str(corpus) if corpus else None,
        )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _architecture(told: Mapping[str, Any], where: Path) -> str:
    kind = str(told.get("architecture") or "standard")
    activation = str(told.get("activation_fn") or told.get("activation_fn_str") or "relu")
    if kind == "standard" and activation == "topk":
        kind = "topk"
    elif activation not in {"relu", "topk"}:
        raise LayoutError(f"{where}: the activation function is {activation!r}; relu and topk are read.")
    if kind not in _KINDS:
        raise LayoutError(
            f"{where}: the architecture is {kind!r}, whose latents cannot be read one by one as a dot product and a "
            f"threshold. {did_you_mean(kind, _KINDS)}"
        )
    return kind


def _taps(told: Mapping[str, Any], stated: Stated, where: Path, *, transcodes: bool) -> tuple[Any, Any]:
    hook = told.get("hook_name") or told.get("hook_point")
    tap = agreed_tap(tap_of_hook(str(hook), where=str(where)) if hook else None, stated, where)
    if not transcodes:
        return tap, None
    out = told.get("hook_name_out")
    if not out:
        raise LayoutError(f"{where}: a transcoder without 'hook_name_out': it does not say what it predicts.")
    return tap, tap_of_hook(str(out), where=str(where))


def _size(told: Mapping[str, Any], key: str, where: Path) -> int:
    value = told.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LayoutError(f"{where}: {key!r} is {value!r}; it must be a positive whole number.")
    return value


def _refuse_leftovers(told: Mapping[str, Any], tensors: Tensors, where: Path) -> None:
    """What would change the codes and is not read."""
    if told.get("reshape_activations", "none") != "none" or told.get("hook_head_index") is not None:
        raise LayoutError(f"{where}: reads single attention heads, which is no tap. Use one on attn_out or the stream.")
    factor = tensors.get("finetuning_scaling_factor", tensors.get("scaling_factor"))
    if factor is not None and not np.allclose(factor, 1.0):
        raise LayoutError(
            f"{where}: has fine-tuned scaling factors, which SAELens 6 no longer applies: the two would differ. "
            "Save it again without them."
        )


def _scaling(told: Mapping[str, Any], stated: Stated, where: Path) -> dict[str, Any]:
    given = told.get("normalize_activations") or "none"
    name = _SCALED if given is True else str(given)
    if name == _SCALED:
        if stated.input_factor is None:
            raise LayoutError(
                f"{where}: inputs are multiplied by a constant (normalize_activations: {name}) that the files do not "
                "hold. Say it with --input-factor: it brings the mean norm of the model's rows to sqrt(d_in)."
            )
        return {"input_factor": stated.input_factor}
    if name not in _NORMALISATIONS:
        raise LayoutError(
            f"{where}: normalize_activations is {name!r}. {did_you_mean(name, [*_NORMALISATIONS, _SCALED])} "
            "A whitening is folded into the weights by SAELens (fold_activation_whitening): save it again."
        )
    return {"normalisation": _NORMALISATIONS[name], "input_factor": stated.input_factor or 1.0}


def _thresholded(
    kind: str, told: Mapping[str, Any], tensors: Tensors, parts: dict[str, Any], folder: Path
) -> tuple[Sae, int | None]:
    where, width = folder / _WEIGHTS, len(parts["encoder_bias"])
    if kind in _RANKED and told.get("rescale_acts_by_decoder_norm", False):
        norms = np.linalg.norm(parts["decoder"].astype(np.float64), axis=1)
        parts |= {
            "encoder": parts["encoder"] * norms[:, None],
            "encoder_bias": parts["encoder_bias"] * norms,
            "decoder": parts["decoder"] / norms[:, None],
        }
    if kind in _JUMPING:
        threshold = take(tensors, "threshold", (width,), where)
        return Sae.folded(**parts, activation=Activation.JUMPRELU, threshold=threshold), None
    if kind == "topk":
        rank = object_in(told, "activation_fn_kwargs", where).get("k", told.get("k"))
        return Sae.folded(**parts, activation=Activation.TOPK), _size({"k": rank}, "k", folder / _CONFIG)
    if kind in _RANKED:
        threshold = take(tensors, "topk_threshold", (), where)
        return Sae.folded(**parts, activation=Activation.BATCHTOPK, threshold=float(threshold)), None
    return Sae.folded(**parts, activation=Activation.RELU), None
