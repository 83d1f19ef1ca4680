"""``telltale collect`` refuses options that make no sense before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from probes.errors import TelltaleError
from serving.arguments import engine_arguments
from serving.cli import app


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--taps", "resid_post.1,resid_post.1"], "resid_post.1 twice"),
        (["--taps", "12"], "is not of the form"),
        (["--taps", "resid_pre.1"], "resid_pre"),
        (["--taps", "resid_post.1", "--positions", "lst"], "Did you mean 'last'"),
        (["--taps", "resid_post.1", "--format", "chats"], "Did you mean 'chat'"),
        (["--taps", "resid_post.1", "--format", "raw", "--positions", "template"], "raw text has no template"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(app, ["collect", str(tmp_path / "prompts.jsonl"), "--out", str(out), *options])
    assert isinstance(found.exception, TelltaleError)
    assert message in str(found.exception)
    assert not out.exists()


def test_the_embedded_model_is_run_as_it_is_served_unless_flags_say_otherwise(tmp_path: Path) -> None:
    served = engine_arguments("builtin:m", ["--max-num-seqs", "8"], tmp_path)
    assert served[0] == str(tmp_path)
    assert served.count("--max-num-seqs") == 1
    assert served[served.index("--max-num-seqs") + 1] == "8"
    assert served[served.index("--dtype") + 1] == "float32"
    assert engine_arguments("org/model", ["--dtype", "bfloat16"], None) == ["org/model", "--dtype", "bfloat16"]
