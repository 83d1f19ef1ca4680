"""A ``TapSet`` over modules of a test, without a model around them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from probes.bank import Bank
from probes.detectors import load_detector
from probes.taps import Tap
from serving.engine.layers import KNOWN, Stack
from serving.engine.taps import TapSet
from tests.unit.artifacts import make_card, unit_artifact


def tap_set(modules: Mapping[int, nn.Module], *, capacity: int) -> TapSet:
    """Taps at these layers' residual streams.

    Args:
        modules: by layer; they carry the buffers of a tap with ``capacity`` columns.
        capacity: of the bank.
    """
    detectors = [load_detector(unit_artifact(make_card(f"d{layer}", layers=(layer,)))) for layer in modules]
    d_model = int(np.asarray(detectors[0].directions()[0].weight).shape[0])
    bank = Bank(detectors, d_model=d_model, num_layers=max(modules) + 1, capacity=capacity)
    stack = Stack(dict(modules), next(iter(KNOWN.values())), None)
    return TapSet(bank, {Tap(layer): module for layer, module in modules.items()}, stack, torch.device("cpu"))
