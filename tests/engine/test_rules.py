"""Rules that join verdicts, in a real engine."""

from __future__ import annotations

import pytest

from tests.engine.test_serving import ask, metric
from tests.support.server import Server
from tests.support.tiny import TinyModel

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("times", "fires"), [(0, False), (1, True), (2, True), (3, False)])
def test_an_exception_is_known_when_the_prompt_is_through(
    open_: Server, tiny: TinyModel, times: int, fires: bool
) -> None:
    labels = {"rule": "once-or-twice", "action": "flag", "mode": "shadow"}
    before = metric(open_, "telltale_actions_total", **labels)
    ask(open_, f"Tell me{tiny.trigger_text * times} please", tokens=2)
    assert metric(open_, "telltale_actions_total", **labels) == before + fires
