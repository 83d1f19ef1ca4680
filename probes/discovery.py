"""Find the classes that the files of a package define, so that a new kind is one file. Keeps no state of its own."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import TypeVar

from probes.errors import TelltaleError

T = TypeVar("T")


class DiscoveryError(TelltaleError, RuntimeError):
    """Two files of one package claim the same kind."""


def discover(package: ModuleType, base: type[T], kind_of: str = "kind") -> Mapping[str, type[T]]:
    """All concrete subclasses of ``base`` that the modules of ``package`` define, by kind.

    Every folder on ``package.__path__`` is looked at, so a folder that is appended to it adds kinds.

    Args:
        package: an imported package.
        base: the class that a kind derives from.
        kind_of: the class attribute that holds the kind's name.
    Returns: an immutable mapping, sorted by kind.
    Raises:
        DiscoveryError: two classes have the same kind.
    """
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__ or not issubclass(cls, base) or inspect.isabstract(cls):
                continue
            kind = getattr(cls, kind_of, None)
            if not isinstance(kind, str):
                continue
            if kind in found:
                raise DiscoveryError(
                    f"{package.__name__}: {cls.__module__} and {found[kind].__module__} both define the kind "
                    f"{kind!r}. Rename one of them."
                )
            found[kind] = cls
    return MappingProxyType(dict(sorted(found.items())))
