"""The names that other libraries give to places in a model, as taps."""

from __future__ import annotations

import re

from probes.sae.layouts.base import LayoutError
from probes.taps import Site, Tap

_LENS = re.compile(r"blocks\.(?P<layer>[0-9]+)\.(?P<point>.+)")
_MODULE = re.compile(
    r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h)[._](?P<layer>[0-9]+)(?P<rest>.*)"
)
_SITES = {
    "hook_resid_post": Site.RESID_POST,
    "hook_attn_out": Site.ATTN_OUT,
    "hook_mlp_out": Site.MLP_OUT,
}
_MODULE_SITES = {"": Site.RESID_POST, ".mlp": Site.MLP_OUT, ".self_attn": Site.ATTN_OUT, ".attn": Site.ATTN_OUT}
_ALLOWED = (
    "Places that are read: the stream after a layer (blocks.N.hook_resid_post, model.layers.N), before it where it is "
    "not the first (blocks.N.hook_resid_pre), and what its attention or MLP returns (hook_attn_out, hook_mlp_out, "
    "model.layers.N.self_attn, model.layers.N.mlp). Use an autoencoder that was trained at one of them."
)


def tap_of_hook(name: str, *, where: str) -> Tap:
    """The tap that a hook point of TransformerLens, or the output of a module of transformers, stands for.

    ``blocks.N.hook_resid_pre`` is the stream after layer N - 1.

    Args:
        name: e.g. ``blocks.15.hook_resid_post`` or ``model.layers.15``.
        where: the file that names it, for messages.
    Raises:
        LayoutError: no tap is the same place.
    """
    lens = _LENS.fullmatch(name)
    if lens is not None:
        layer, point = int(lens["layer"]), lens["point"]
        if point == "hook_resid_pre" and layer > 0:
            return Tap(layer - 1)
        if point in _SITES:
            return Tap(layer, _SITES[point])
    module = _MODULE.fullmatch(name)
    if module is not None and module["rest"] in _MODULE_SITES:
        return Tap(int(module["layer"]), _MODULE_SITES[module["rest"]])
    raise LayoutError(f"{where}: reads {name!r}, which is no tap. {_ALLOWED}")
