"""A folder that shadows one of our packages is noticed; our own folders are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from serving.packages import shadowed_packages


def test_our_packages_are_ours() -> None:
    assert shadowed_packages() is None


@pytest.mark.parametrize("name", ["dashboards"])
def test_a_folder_in_front_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    problem = shadowed_packages()
    assert problem is not None
    assert str(tmp_path / name) in problem
    assert "shadows" in problem
