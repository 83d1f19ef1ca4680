"""The deployment of a vLLM process, from the environment and vLLM's own configuration."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from probes.errors import TelltaleError
from serving.deployment import Deployment, deploy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_VARIABLE = "TELLTALE_CONFIG"
"""Path of the policy file. Telltale is active in a vLLM process if and only if it is set."""


class RuntimeConfigError(TelltaleError, RuntimeError):
    """A process was started as part of a monitored server, but cannot find what to run."""


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
