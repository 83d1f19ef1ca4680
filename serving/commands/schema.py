"""``telltale schema``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from monitor.config import Config
from serving.cli import EXIT_FAILED

COMMITTED = Path("docs/telltale.schema.json")


def render_schema() -> str:
    """The JSON schema of the policy file, as text."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Telltale policy file",
        **Config.model_json_schema(),
    }
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def schema(*, check_only: bool) -> None:
    """Print the schema, or compare it with the committed one."""
    text = render_schema()
    if not check_only:
        sys.stdout.write(text)
        return
    if not COMMITTED.is_file() or COMMITTED.read_text() != text:
        sys.stderr.write(f"{COMMITTED} is not the present schema. Run: telltale schema > {COMMITTED}\n")
        sys.exit(EXIT_FAILED)
