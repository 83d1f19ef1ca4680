"""Find the classes that the files of a package define, so that a new kind is one file; and those of other packages.

A distribution adds kinds by an entry point in the group ``telltale.NAME``, NAME being the last part of the package's
name: ``[project.entry-points."telltale.detectors"] mine = "my_package.my_detector"``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import TypeVar

from probes.errors import TelltaleError

T = TypeVar("T")


class DiscoveryError(TelltaleError, RuntimeError):
    """Two files claim the same kind, or one that another distribution names cannot be imported."""


def discover(package: ModuleType, base: type[T], kind_of: str = "kind") -> Mapping[str, type[T]]:
    """All concrete subclasses of ``base`` that the modules of ``package`` define, by kind.

    Every folder on ``package.__path__`` is looked at, so a folder that is appended to it adds kinds; then the modules
    that other distributions name.

    Args:
        package: an imported package.
        base: the class that a kind derives from.
        kind_of: the class attribute that holds the kind's name.
    Returns: an immutable mapping, sorted by kind.
    Raises:
        DiscoveryError: two classes have the same kind, or a named module cannot be imported.
    """
    found: dict[str, type[T]] = {}
    for module in _modules(package):
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


def group_of(package: ModuleType) -> str:
    """The entry-point group that adds kinds to a package."""
    return f"telltale.{package.__name__.rpartition('.')[2]}"


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{info.name}")
    yield from installed_modules(group_of(package))


@cache
def installed_modules(group: str) -> tuple[ModuleType, ...]:
    """The modules that installed distributions name in an entry-point group; looked up once in a process.

    Raises:
        DiscoveryError: one cannot be imported, or is no module.
    """
    found = []
    for entry in sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value)):
        owner = f"entry point {entry.name!r} of {entry.dist.name if entry.dist else 'a distribution'} in {group}"
        try:
            module = entry.load()
        except (ImportError, AttributeError) as error:
            raise DiscoveryError(
                f"{owner}: {entry.value!r} cannot be imported ({error}). Install a version of it that works, or "
                "remove it."
            ) from error
        if not isinstance(module, ModuleType):
            raise DiscoveryError(f"{owner}: {entry.value!r} is no module. It names the file that defines the kind.")
        found.append(module)
    return tuple(found)
