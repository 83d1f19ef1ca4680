"""Read a policy file, and say of every mistake in it where it stands and what is allowed there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from monitor.config import Config
from monitor.when import CONDITION_KEYS, CONDITION_MODELS, When, condition_model, is_tag
from probes.aggregate import Aggregator, aggregator_kinds
from probes.errors import TelltaleError, did_you_mean

Place = tuple[str | int, ...]
_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 32
_MAX_SHOWN = 60


class PolicyError(TelltaleError, ValueError):
    """A policy file cannot be used. The text holds one line for each mistake: file, line, key, what is allowed."""


class PolicyFile:
    """A policy file that has been read: the data, and the lines on which its keys stand.

    Args:
        path: where it was read from; relative paths in it are relative to its folder.
        config: the validated content.
        tree: the parsed YAML, with positions.
        text: as it stands there.
    """

    def __init__(self, path: Path, config: Config, tree: CommentedMap, text: str = "") -> None:
        self.path = path
        self.config = config
        self.text = text
        self._tree = tree

    def error(self, where: Place, message: str) -> PolicyError:
        """A mistake that shows only once detectors are loaded, said with its place in the file."""
        return PolicyError(_line(self.path, self._tree, where, message))

    def resolve(self, path: str) -> Path:
        """A path in the file, relative to the file's folder."""
        return (self.path.parent / path).resolve()


def read_policy_file(path: Path) -> PolicyFile:
    """Read and validate.

    Raises:
        PolicyError: the file cannot be read, is not YAML, has a duplicate or unknown key, or a value out of bounds.
    """
    return parse_policy(path, read_policy_text(path))


def read_policy_text(path: Path) -> str:
    """Read, and leave the validation to ``parse_policy``.

    Raises:
        PolicyError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror}). Pass the policy file's path.") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def parse_policy(path: Path, text: str) -> PolicyFile:
    """Validate the text of a policy file.

    Args:
        path: where it stands or, if it came another way, what relative paths in it are relative to and what it is
            called in messages.
        text: YAML.
    Raises:
        PolicyError: it is not YAML, has a duplicate or unknown key, or a value out of bounds.
    """
    tree = _parse(path, text)
    try:
        config = Config.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        # A list is also called too short when its entries are what is wrong: those say it better.
        found = error.errors()
        items = [item for item in found if not (item["type"] == "too_short" and _says_more(found, _loc(item)))]
        lines = [
            (_line_number(tree, _loc(item)), _line(path, tree, _loc(item), _message(item, tree))) for item in items
        ]
        raise PolicyError("\n".join(text for _, text in sorted(lines, key=lambda line: line[0]))) from error
    return PolicyFile(path, config, tree, text)


def _parse(path: Path, text: str) -> CommentedMap:
    if len(text) > _MAX_BYTES:
        raise PolicyError(f"{path}: has {len(text):,} characters; at most {_MAX_BYTES:,} are read.")
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = False
    try:
        tree = yaml.load(text)
    except DuplicateKeyError as error:
        mark = error.problem_mark
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise PolicyError(f"{path}:{mark.line + 1}: the key {key!r} stands here twice. Keep one of them.") from error
    except MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        line = f":{place.line + 1}" if place is not None else ""
        raise PolicyError(f"{path}{line}: not YAML: {error.problem}.") from error
    except YAMLError as error:
        raise PolicyError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, AttributeError) as error:
        # A date that does not exist, a number of thousands of digits; AttributeError is how the library answers a
        # mapping that is merged into itself.
        raise PolicyError(f"{path}: holds a value that cannot be read ({str(error).splitlines()[0]}).") from error
    except RecursionError as error:
        raise PolicyError(f"{path}: is nested too deeply to be read. Write it flatter.") from error
    if not isinstance(tree, CommentedMap):
        raise PolicyError(f'{path}:1: a policy file is a mapping that begins with version: "1".')
    _refuse_not_json(path, tree)
    return tree


def _refuse_not_json(path: Path, tree: CommentedMap) -> None:
    """YAML can say more than JSON: keys that are no text, NaN, a value inside itself, a line for a million values."""
    waiting: list[tuple[object, Place]] = [(tree, ())]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return
        node, where = waiting.pop()
        if isinstance(node, float) and not math.isfinite(node):
            raise PolicyError(_line(path, tree, where, f"is {node}; it must be a finite number."))
        if len(where) > _MAX_DEPTH:
            raise PolicyError(_line(path, tree, where[:1], "is nested too deeply, or contains itself. Write it out."))
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(node, dict):
            items = node.items()
        elif isinstance(node, list):
            items = enumerate(node)
        for key, child in items:
            if isinstance(node, dict) and not isinstance(key, str):
                raise PolicyError(_line(path, tree, where, f"the key {_shown(key)} is not text. Put it in quotes."))
            waiting.append((child, (*where, key)))
    raise PolicyError(f"{path}: holds more than {_MAX_VALUES:,} values once its aliases are written out. Shorten it.")


def _line(path: Path, tree: CommentedMap, where: Sequence[str | int], message: str) -> str:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    return f"{path}:{_line_number(tree, where)}: {dotted + ': ' if dotted else ''}{message}"


def _line_number(tree: CommentedMap, where: Sequence[str | int]) -> int:
    node: Any = tree
    line = 0
    for key in where:
        # What was merged in from an anchor has no line of its own: it is said to stand where it is used.
        if not isinstance(node, CommentedMap | CommentedSeq) or key not in (node.lc.data or {}):
            break
        line = node.lc.data[key][0]
        node = node[key]
    return line + 1


def _says_more(items: Sequence[ErrorDetails], where: Place) -> bool:
    """Whether a mistake stands inside of this place."""
    return any(len(_loc(item)) > len(where) and _loc(item)[: len(where)] == where for item in items)


def _loc(item: ErrorDetails) -> Place:
    return tuple(part for part in item["loc"] if not is_tag(part))


def _message(item: ErrorDetails, tree: CommentedMap) -> str:
    kind, where = item["type"], _loc(item)
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        key = str(where[-1])
        return f"{key!r} is not a key here. {did_you_mean(key, _keys_at(where[:-1], tree))}"
    if kind == "missing":
        return f"is missing. {_describe(where, tree)}".rstrip()
    if kind in {"literal_error", "enum"}:
        expected = str(context.get("expected", ""))
        known = re.findall(r"'([^']*)'", expected) or re.split(", | or ", expected)
        return f"is {_shown(item['input'])}. {did_you_mean(str(item['input']), known)}"
    if kind == "value_error":
        return f"{str(context.get('error', item['msg'])).rstrip('.')}."
    message = f"{item['msg'][0].lower()}{item['msg'][1:]}"
    return f"is {_shown(item['input'])}: {message}. {_describe(where, tree)}".rstrip()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _keys_at(where: Place, tree: CommentedMap) -> list[str]:
    model = _model_at(where, tree)
    if model is None:
        return []
    if model is When:  # what else could have been meant
        return sorted(CONDITION_KEYS)
    keys = {field.alias or name for name, field in model.model_fields.items()}
    return sorted({*keys, *(["kind"] if issubclass(model, Aggregator) else [])})


def _describe(where: Place, tree: CommentedMap) -> str:
    model = _model_at(where[:-1], tree)
    field = _field(model, where[-1]) if model is not None and where else None
    return f"It is: {field.description}." if field is not None and field.description else ""


def _model_at(where: Place, tree: CommentedMap) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    node: Any = tree
    for key in where:
        node = node[key]
        if not isinstance(key, int):
            field = _field(model, key) if model is not None else None
            if field is None:
                return None
            model = _model_in(field.annotation)
        if model is Aggregator:
            model = aggregator_kinds().get(str(node.get("kind")))
        elif model in CONDITION_MODELS and isinstance(node, dict):
            model = condition_model(node)
    return model


def _field(model: type[BaseModel], key: str | int) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key == (field.alias or name)), None)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, UnionType, tuple):
        for part in get_args(annotation):
            if (found := _model_in(part)) is not None:
                return found
    return None
