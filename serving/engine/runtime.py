"""What a vLLM process runs on, from the environment and vLLM's own configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from monitor.steers import SteerPlan
from probes.bank import Bank
from probes.card import ModelRef
from probes.errors import TelltaleError
from probes.modelref import read_model_ref
from probes.taps import Tap
from serving.deployment import Deployment, deploy
from serving.engine.capture import CAPTURE_KEY, capture_bank, captured_taps

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_VARIABLE = "TELLTALE_CONFIG"
"""Path of the policy file. Telltale is active in a vLLM process if and only if it is set."""

WATCH_VARIABLE = "TELLTALE_WATCH_POLICY"
"""Set to 1 (by ``telltale serve --watch-policy``): the policy file is watched, and read again when it changes."""


class RuntimeConfigError(TelltaleError, RuntimeError):
    """A process was started as part of a monitored server, but cannot find what to run."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """What a worker does at the model's layers.

    Attributes:
        bank: what is read.
        steering: what may be written.
        num_layers: decoder layers of the model.
        pick: whose whole rows may be asked for; None if nobody will.
    """

    bank: Bank
    steering: SteerPlan
    num_layers: int
    pick: Tap | None = None


def policy_path() -> Path | None:
    """The policy file of this process, or None if it is not monitored."""
    value = os.environ.get(CONFIG_VARIABLE)
    return Path(value) if value else None


def load_deployment(vllm_config: VllmConfig) -> Deployment:
    """The deployment that this process is part of; the same object at every call.

    Raises:
        RuntimeConfigError: the environment names no policy file.
        probes.errors.TelltaleError: see ``serving.deployment.deploy``.
    """
    path = policy_path()
    if path is None:
        raise RuntimeConfigError(
            f"{CONFIG_VARIABLE} is not set in this process, although its engine is monitored. Start it with telltale "
            f"serve, or set {CONFIG_VARIABLE} to the policy file for every process."
        )
    model = vllm_config.model_config
    return _deploy(path, model.model, model.revision, str(model.dtype).removeprefix("torch."))


def load_worker_plan(vllm_config: VllmConfig) -> WorkerPlan:
    """What the workers of an engine do: as its policy says, or capture activations where it has none.

    Raises:
        RuntimeConfigError: it has both a policy and taps to capture, or neither.
        probes.errors.TelltaleError: see ``load_deployment`` and ``serving.engine.capture.capture_bank``.
    """
    taps = captured_taps(vllm_config)
    if not taps:
        deployment = load_deployment(vllm_config)
        return WorkerPlan(
            deployment.plan.bank, deployment.plan.steering, deployment.model.num_layers, deployment.explained_tap
        )
    if policy_path() is not None:
        raise RuntimeConfigError(
            f"{CONFIG_VARIABLE} is set in a process whose engine is told to capture activations ({CAPTURE_KEY} in "
            f"--additional-config). A server reads what its policy says: leave {CAPTURE_KEY} out. To capture, unset "
            f"{CONFIG_VARIABLE} and use telltale collect."
        )
    model = read_served_model(vllm_config)
    bank = capture_bank(taps, d_model=model.d_model, num_layers=model.num_layers)
    return WorkerPlan(bank, SteerPlan(steers=(), matrices=(), index={}), model.num_layers)


def read_served_model(vllm_config: VllmConfig, *, model_id: str | None = None) -> ModelRef:
    """Which model an engine runs.

    Args:
        vllm_config: of the engine.
        model_id: what people call it, if not by its folder.
    Raises:
        probes.modelref.ModelRefError: its folder holds no model.
    """
    model = vllm_config.model_config
    folder = model_folder(model.model, model.revision)
    dtype = str(model.dtype).removeprefix("torch.")
    return read_model_ref(folder, model_id=model_id or _served_name(model.model), dtype=dtype)


@lru_cache(maxsize=1)
def _deploy(path: Path, model: str, revision: str | None, dtype: str) -> Deployment:
    return deploy(path, model_dir=model_folder(model, revision), model_id=_served_name(model), dtype=dtype)


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model: itself if it is one, else its snapshot in the hub's cache (downloaded if missing)."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
        )
    )


def _served_name(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model
