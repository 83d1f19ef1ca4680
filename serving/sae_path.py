"""Where a policy file's sparse autoencoders are."""

from __future__ import annotations

from pathlib import Path

from monitor.yaml_file import Place, PolicyFile
from probes.packs import PackError
from probes.packs.saes import is_shipped, shipped_sae


def sae_path(file: PolicyFile, where: Place, name: str) -> Path:
    """The file of a sparse autoencoder: one that ships, or a path relative to the policy file.

    Args:
        file: the policy file.
        where: it is named.
        name: as it stands there.
    Raises:
        PolicyError: it asks for one that does not ship.
    """
    if not is_shipped(name):
        return file.resolve(name)
    try:
        return shipped_sae(name)
    except PackError as error:
        raise file.error(where, str(error)) from error
