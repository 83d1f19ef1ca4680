"""Settings that open routes around the monitor are refused, on the command line and in vLLM's own configuration."""

from __future__ import annotations

from argparse import Namespace

import pytest

from serving.api.open_routes import OPENING, OpenRouteError, refuse_open_routes
from serving.commands.serve import serve


@pytest.mark.parametrize("flag", sorted(OPENING))
def test_it_is_refused_by_its_name(flag: str) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    with pytest.raises(OpenRouteError, match=flag):
        refuse_open_routes(Namespace(**{name: True}))
    refuse_open_routes(Namespace(**{name: False}))


@pytest.mark.parametrize("spelled", [flag for name in OPENING for flag in (name, "--" + name[2:].replace("-", "_"))])
def test_the_command_says_so_before_anything_is_loaded(spelled: str) -> None:
    with pytest.raises(OpenRouteError, match="Leave it out"):
        serve("builtin:smollm2-135m-instruct", None, [spelled])
