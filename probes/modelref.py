"""Which model a folder holds: digests of its weights, tokenizer and chat template. Loads no model and no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from probes.artifact import sha256_file
from probes.cachedir import user_cache_dir
from probes.card import ModelRef
from probes.errors import TelltaleError

__all__ = ["ModelRefError", "chat_template_of", "read_model_ref"]

_WEIGHT_PATTERNS = (("*.safetensors",), ("*.bin", "*.gguf"))
_TOKENIZER_FILES = ("merges.txt", "tokenizer.json", "tokenizer.model", "vocab.json")
_WIDTH_KEYS = ("hidden_size", "n_embd")
_LAYER_KEYS = ("num_hidden_layers", "n_layer")


class ModelRefError(TelltaleError, ValueError):
    """A folder does not hold a model that can be told apart from others."""


def read_model_ref(
    model_dir: Path, *, model_id: str, dtype: str, chat_template: str | None = None, cache_dir: Path | None = None
) -> ModelRef:
    """Say which model a folder holds, so that a detector can be bound to it.

    The SHA-256 of each large file is kept in the user's cache under its real path, size and modification time: the
    second call reads no weights.

    Args:
        model_dir: folder in transformers' layout.
        model_id: name for people.
        dtype: of the weights as served, e.g. ``float32``.
        chat_template: the template that is used, if it is not the folder's own.
        cache_dir: another cache folder than the user's.
    Raises:
        ModelRefError: no folder, no ``config.json``, no weights or no tokenizer in it, or a field that cannot be read.
    """
    if not model_dir.is_dir():
        raise ModelRefError(
            f"model {model_id!r}: {model_dir} is not a folder. A folder with config.json, weights and tokenizer is "
            "needed: download the model first and name its folder."
        )
    cache = (cache_dir or user_cache_dir()) / "digests"
    config = _read_json(model_dir / "config.json")
    weights = _first_match(model_dir)
    tokenizer = [path for name in _TOKENIZER_FILES if (path := model_dir / name).is_file()]
    if not weights:
        allowed = ", ".join(pattern for group in _WEIGHT_PATTERNS for pattern in group)
        raise ModelRefError(
            f"model {model_id!r}: {model_dir} holds no weights ({allowed} are looked for). "
            "Name the folder that the weight files lie in."
        )
    if not tokenizer:
        raise ModelRefError(
            f"model {model_id!r}: {model_dir} holds no tokenizer ({', '.join(_TOKENIZER_FILES)} are looked for). "
            "Put the tokenizer's files beside the weights: detectors are bound to both."
        )
    template = chat_template_of(model_dir) if chat_template is None else chat_template
    return ModelRef(
        id=model_id,
        weight_digest=_digest_of(weights, cache),
        tokenizer_digest=_digest_of(tokenizer, cache),
        chat_template_digest=hashlib.sha256(template.encode()).hexdigest(),
        d_model=_positive(config, _WIDTH_KEYS, model_dir),
        num_layers=_positive(config, _LAYER_KEYS, model_dir),
        dtype=dtype,
    )


def chat_template_of(model_dir: Path) -> str:
    """The default chat template of a model folder; empty if it has none.

    ``chat_template.jinja`` comes before ``tokenizer_config.json``, as in transformers; of several named templates the
    one called ``default`` counts.

    Raises:
        ModelRefError: ``tokenizer_config.json`` is damaged.
    """
    own = model_dir / "chat_template.jinja"
    if own.is_file():
        return _read_text(own)
    config_path = model_dir / "tokenizer_config.json"
    if not config_path.is_file():
        return ""
    found = _read_json(config_path).get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _first_match(model_dir: Path) -> list[Path]:
    for group in _WEIGHT_PATTERNS:
        if found := [path for pattern in group for path in model_dir.glob(pattern) if path.is_file()]:
            return found
    return []


def _digest_of(paths: Iterable[Path], cache: Path) -> str:
    lines = sorted(f"{path.name} {_cached_sha256(path, cache)}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _cached_sha256(path: Path, cache: Path) -> str:
    real = path.resolve()
    try:
        stat = real.stat()
        key = {"path": str(real), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        entry = cache / f"{hashlib.sha256(str(real).encode()).hexdigest()}.json"
        if (known := _known_digest(entry, key)) is not None:
            return known
        digest = sha256_file(real)
    except OSError as error:
        raise ModelRefError(
            f"{path}: cannot be read ({error.strerror}). Every weight and tokenizer file must be readable: "
            "check its permissions, or download it again."
        ) from error
    # A cache that cannot be written costs time at the next start, nothing else.
    with contextlib.suppress(OSError):
        _remember(entry, {**key, "sha256": digest})
    return digest


def _known_digest(entry: Path, key: Mapping[str, object]) -> str | None:
    try:
        stored = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or any(stored.get(name) != value for name, value in key.items()):
        return None
    digest = stored.get("sha256")
    return digest if isinstance(digest, str) else None


def _remember(entry: Path, value: Mapping[str, object]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=entry.parent, prefix=".", delete=False, encoding="utf-8") as handle:
        json.dump(value, handle)
    os.replace(handle.name, entry)


def _positive(config: Mapping[str, Any], keys: tuple[str, ...], model_dir: Path) -> int:
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in keys:
            value = place.get(key)
            if isinstance(value, int) and value > 0:
                return value
    raise ModelRefError(
        f"{model_dir / 'config.json'}: none of the fields {', '.join(keys)} holds a positive whole number (nor in "
        "'text_config'). Use a model folder in transformers' layout."
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ModelRefError(
            f"{path}:{error.lineno}: not JSON ({error.msg}). The file is damaged: download the model again."
        ) from error
    if not isinstance(value, dict):
        raise ModelRefError(f"{path}: holds a {type(value).__name__}, not an object. Download the model again.")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelRefError(
            f"{path}: cannot be read ({error.strerror}). A model folder has this file: name the right folder."
        ) from error
    except UnicodeDecodeError as error:
        raise ModelRefError(f"{path}: not UTF-8 text at byte {error.start}. Download the model again.") from error
