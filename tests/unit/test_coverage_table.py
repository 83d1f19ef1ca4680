"""docs/coverage.md is what the markers of the tests say, every mode is in it, and a wrong marker is an error."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monitor.canary import CanaryFailure
from monitor.types import Gap
from tests.support.coverage_marks import ROOT, MarkError, Proof, proofs, proofs_of
from tests.support.coverage_rows import FAULTS, MODES, NOT_COVERED
from tests.support.coverage_table import DOCUMENT, main, problems, render

HEAD = "import pytest\n\n"
MAPPED = """\
ROWS = {"a": "compiled", "b": "n > 1"}

@pytest.mark.covers(ROWS, "isolation")
@pytest.mark.parametrize("mode", [PARAMETERS])
def test_it(mode):
    pass
"""


@pytest.fixture(scope="module")
def found() -> list[Proof]:
    return proofs()


def constants(path: str) -> dict[str, Any]:
    """The literal dictionaries of a test module, which would take seconds to import."""
    tree = ast.parse((ROOT / path).read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    return {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in assigned}


def test_the_document_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_mode_is_covered_or_says_why_not(found: list[Proof]) -> None:
    assert problems(found) == []
    for mode in MODES:
        left = [proof for proof in found if proof.mode != mode]
        assert any(f"{mode!r} has neither" in line for line in problems(left)) == (mode not in NOT_COVERED)
    invented = [*found, Proof("CUDA", "isolation", "unit/test_x.py::test_x", None, False)]
    assert problems(invented) == ["'CUDA' is in NOT_COVERED and has a test"]


def test_each_row_names_a_test_that_is_there(found: list[Proof]) -> None:
    text = (ROOT / DOCUMENT).read_text()
    for proof in found:
        assert f"`{proof.test}`" in text
        file, *names = proof.test.split("::")
        body: Any = ast.parse((ROOT / "tests" / file).read_text()).body
        for name in names:
            (node,) = [node for node in body if getattr(node, "name", None) == name]
            body = node.body


def test_reasons_are_those_that_the_fault_tests_demand() -> None:
    said = constants("tests/engine/test_faults.py")
    assert {name: FAULTS[row].counted for name, row in said["FAULT_ROWS"].items()} == said["REASONS"]
    assert set(said["CANARY_ROWS"]) == set(said["CANARY_REASONS"])
    assert {FAULTS[row].counted for row in said["CANARY_ROWS"].values()} == {"canary"}
    assert {fault.counted for fault in FAULTS.values() if fault.is_gap} == {gap.value for gap in Gap}
    assert {*said["CANARY_REASONS"].values()} <= {failure.value for failure in CanaryFailure}


def test_markers_are_read_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        HEAD + 'ROWS = {"a": "compiled", "b": "n > 1"}\n'
        '@pytest.mark.covers(["chat", "abort"], "isolation")\n'
        "class TestIt:\n"
        '    @pytest.mark.covers(ROWS, "verdict the same", slow=True)\n'
        "    async def test_one(self):\n        pass\n"
        "    @pytest.mark.slow\n    def test_two(self):\n        pass\n"
        "def test_three():\n    pass\n"
    )
    one, two = "test_some.py::TestIt::test_one", "test_some.py::TestIt::test_two"
    assert proofs_of(file, tmp_path) == [
        Proof("chat", "isolation", one, None, False),
        Proof("abort", "isolation", one, None, False),
        Proof("compiled", "verdict the same", one, "a", True),
        Proof("n > 1", "verdict the same", one, "b", True),
        Proof("chat", "isolation", two, None, True),
        Proof("abort", "isolation", two, None, True),
    ]
    file.write_text(HEAD + "pytestmark = [pytest.mark.engine, pytest.mark.slow]\n" + file.read_text())
    assert all(proof.slow for proof in proofs_of(file, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('"chatt", "isolation"', "the mode or fault 'chatt' is not in .* Did you mean 'chat'?"),
        ('"chat", "isolated"', "the invariant 'isolated' is not in .* Did you mean 'isolation'?"),
        ('"chat", "xyz"', "Known are: every position"),
        ("MODE, 'isolation'", "write covers"),
        ("'chat'", "write covers"),
    ],
)
def test_a_marker_that_is_wrong_is_named_with_its_place(tmp_path: Path, arguments: str, told: str) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(f"{HEAD}@pytest.mark.covers({arguments})\ndef test_it():\n    pass\n")
    with pytest.raises(MarkError, match=rf"test_some\.py:3: .*{told}"):
        proofs_of(file, tmp_path)


def test_a_change_of_a_marker_makes_the_document_old(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / DOCUMENT.parent).mkdir()
    assert main(["--check"], tmp_path) == 1
    assert "coverage.md is not what the markers of the tests say. Run: " in capsys.readouterr().err
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    added = tmp_path / "tests" / "unit" / "test_added.py"
    added.write_text(f'{HEAD}@pytest.mark.covers("chat", "isolation")\ndef test_it():\n    pass\n')
    assert main(["--check"], tmp_path) == 1
    added.write_text(added.read_text().replace('"chat"', '"chatt"'))
    assert main(["--check"], tmp_path) == 1
    assert "Did you mean 'chat'?" in capsys.readouterr().err


def test_a_test_that_loses_its_marker_is_missed(found: list[Proof]) -> None:
    fewer = [proof for proof in found if proof.test.split("::")[0] != "engine/test_faults.py"]
    assert any("'readouts of another width' has no test" in line for line in problems(fewer))
    assert render(fewer) != render(found)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ('"a", "b"', None),
        ('"a", "b", "c"', "must be a key of"),
        ('"a", pytest.param("b", marks=pytest.mark.slow)', "the table would say"),
    ],
)
def test_pytest_sees_what_the_table_says(tmp_path: Path, parameters: str, told: str | None) -> None:
    """In a pytest of its own, with the real conftest: a parameter without a row, or in another tier, is an error."""
    tests = tmp_path / "tests"
    (tests / "support").mkdir(parents=True)
    for file in ("__init__.py", "conftest.py", "support/__init__.py", "support/coverage_marks.py"):
        shutil.copy(ROOT / "tests" / file, tests / file)
    shutil.copy(ROOT / "tests/support/coverage_rows.py", tests / "support")
    (tests / "test_some.py").write_text(HEAD + MAPPED.replace("PARAMETERS", parameters))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    covers: x\n    slow: x\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == (pytest.ExitCode.USAGE_ERROR if told else pytest.ExitCode.OK), done.stdout + done.stderr
    assert (told or "2 passed") in done.stdout + done.stderr
