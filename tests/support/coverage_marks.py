"""Reads ``@pytest.mark.covers`` from the source of the tests, without importing them.

``covers(MODE, INVARIANT)`` stands on a test or a class of tests. MODE is a word of ``tests/support/coverage_rows.py``,
a list of them, or, for a parametrised test, a dictionary {value of a parameter: word}, written in place or as a literal
constant of the module. ``slow=True`` says that the parameters of that dictionary are marked slow one by one.
``tests/conftest.py`` holds all this against what pytest sees.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.coverage_rows import FAULTS, INVARIANTS, MODES

ROOT = Path(__file__).parents[2]


class MarkError(Exception):
    """A marker that cannot be read, with its place."""


@dataclass(frozen=True)
class Proof:
    """One test proves one invariant of one mode or fault.

    Attributes:
        mode: a word of ``MODES`` or ``FAULTS``.
        invariant: a word of ``INVARIANTS``.
        test: ``file::class::function``, the file relative to ``tests``.
        parameter: the value of the parameter that stands for the mode; None where the whole test does.
        slow: whether it is left out of the quick tests.
    """

    mode: str
    invariant: str
    test: str
    parameter: str | None
    slow: bool


def known(word: str, words: dict[str, Any], what: str) -> str:
    """The word itself.

    Raises:
        MarkError: it is not one of them.
    """
    if word in words:
        return word
    near = difflib.get_close_matches(word, words, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(words)}."
    raise MarkError(f"{what} {word!r} is not in tests/support/coverage_rows.py. {hint}")


def proofs(root: Path = ROOT) -> list[Proof]:
    """All that the tests say they prove, in the order of files and lines.

    Raises:
        MarkError: a marker cannot be read, or uses an unknown word.
    """
    files = sorted((root / "tests").rglob("test_*.py"))
    return [proof for file in files for proof in proofs_of(file, root / "tests")]


def proofs_of(file: Path, tests: Path = ROOT / "tests") -> list[Proof]:
    """The proofs of one file."""
    text = file.read_text()
    if ".covers(" not in text:
        return []
    tree = ast.parse(text, str(file))
    constants = dict(_constants(tree))
    slow = _is_slow([constants["pytestmark"]]) if "pytestmark" in constants else False
    reader = _Reader(file, file.relative_to(tests).as_posix(), constants)
    return list(reader.walk(tree.body, [], [], slow=slow))


def _constants(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _is_slow(expressions: list[ast.expr]) -> bool:
    """Whether ``pytest.mark.slow`` is among these markers, alone, called, or in a list."""
    flat = [item for node in expressions for item in (node.elts if isinstance(node, ast.List | ast.Tuple) else [node])]
    bare = [item.func if isinstance(item, ast.Call) else item for item in flat]
    return any(ast.unparse(item) == "pytest.mark.slow" for item in bare)


@dataclass(frozen=True)
class _Reader:
    file: Path
    name: str
    constants: dict[str, ast.expr]

    def walk(self, body: list[ast.stmt], path: list[str], marks: list[ast.Call], *, slow: bool) -> Iterator[Proof]:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_class = isinstance(node, ast.ClassDef)
            if not node.name.startswith("Test" if is_class else "test_"):
                continue
            calls = [item for item in node.decorator_list if isinstance(item, ast.Call)]
            own = [call for call in calls if ast.unparse(call.func) == "pytest.mark.covers"]
            here, is_slow = [*path, node.name], slow or _is_slow(node.decorator_list)
            if isinstance(node, ast.ClassDef):
                yield from self.walk(node.body, here, [*marks, *own], slow=is_slow)
            else:
                for call in [*marks, *own]:
                    yield from self._read(call, "::".join([self.name, *here]), is_slow)

    def _read(self, call: ast.Call, test: str, slow: bool) -> Iterator[Proof]:
        try:
            modes, invariant = (self._literal(argument) for argument in call.args)
            (alone,) = [self._literal(item.value) for item in call.keywords if item.arg == "slow"] or [False]
        except ValueError as error:
            raise self._error(call, "write covers(MODE, INVARIANT) with literals, or slow=True behind them") from error
        pairs: list[tuple[str | None, str]]
        if isinstance(modes, dict):
            pairs = list(modes.items())
        else:
            pairs = [(None, mode) for mode in ([modes] if isinstance(modes, str) else modes)]
        for parameter, mode in pairs:
            try:
                known(mode, MODES | FAULTS, "the mode or fault")
                known(invariant, INVARIANTS, "the invariant")
            except MarkError as error:
                raise self._error(call, str(error)) from error
            yield Proof(mode, invariant, test, parameter, slow or bool(alone))

    def _literal(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id not in self.constants:
                raise ValueError(f"{node.id} is no constant of this module")
            node = self.constants[node.id]
        return ast.literal_eval(node)

    def _error(self, call: ast.Call, told: str) -> MarkError:
        return MarkError(f"{self.file}:{call.lineno}: {ast.unparse(call)}: {told}")
