"""Things that are written ``{kind: NAME, ...}`` in files: read by kind, and shown in a schema with their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from probes.errors import TelltaleError, did_you_mean

T = TypeVar("T", bound=BaseModel)


def parse_kinded(
    value: object, base: type[T], kinds: Mapping[str, type[T]], *, what: str, error: type[TelltaleError]
) -> T:
    """Read ``{kind: NAME, ...}``.

    Args:
        value: from a file, or made already.
        base: what all kinds are.
        kinds: by name.
        what: such a thing is called, with its article: ``an aggregate``.
        error: to raise.
    Raises:
        TelltaleError: ``error``: the kind is missing or unknown.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    if isinstance(value, base):
        return value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str):
        raise error(f"{what} is written {{kind: NAME, ...}}. Kinds: {', '.join(sorted(kinds))}.")
    if kind not in kinds:
        name = what.split(maxsplit=1)[-1]
        raise error(f"{name} kind {kind!r} is not known. {did_you_mean(kind, kinds)}")
    return kinds[kind].model_validate({key: item for key, item in value.items() if key != "kind"})


def kinded_schema(kinds: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """JSON schema: one of the kinds, each with its parameters."""
    variants = []
    for kind, cls in kinds.items():
        schema = cls.model_json_schema()
        schema["properties"] = {"kind": {"const": kind, "type": "string"}, **schema.get("properties", {})}
        schema["required"] = ["kind", *schema.get("required", [])]
        variants.append(schema)
    return {"oneOf": variants}
