"""``python -m tests.fuzz TARGET [FLAGS of libFuzzer]``: look for files on which a reader does not refuse as it should.

A finding is written to ``tests/data/fuzz/TARGET``, from where the quick tests run it again for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["probes", "safetensors", "zipfile", "json"]):
    from tests.fuzz.targets import TARGETS

FINDINGS = Path(__file__).parents[1] / "data/fuzz"


def main() -> None:
    """Run libFuzzer."""
    target = TARGETS[sys.argv[1]]
    folder = FINDINGS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    assert not target.run(b""), "the first base is valid"
    flags = [f"-artifact_prefix={folder}/", "-max_len=256", "-timeout=20", "-rss_limit_mb=4096", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], *flags], lambda data: target.run(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
