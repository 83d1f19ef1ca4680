"""Writes what is generated from the catalogue, or says that it is old: ``python -m dashboards [--check]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dashboards.generated_files import generated_files

ROOT = Path(__file__).parents[1]
COMMAND = "make dashboards"


def main(arguments: list[str] | None = None) -> int:
    """Write or compare.

    Returns: 0; with ``--check`` 1 where a file differs from what would be written.
    """
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a file is old")
    parser.add_argument("--out", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    wanted = generated_files()
    if options.check:
        old = [name for name, text in wanted.items() if _read(options.out / name) != text]
        for name in old:
            print(f"{options.out / name} is not what the catalogue gives. Run: {COMMAND}", file=sys.stderr)
        return 1 if old else 0
    for name, text in wanted.items():
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
