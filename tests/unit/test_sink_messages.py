"""What sinks say of each event, to programs and to people."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from monitor.canary import CanaryFailure
from monitor.events import (
    CanaryFailed,
    ConversationFired,
    Event,
    GapSeen,
    Handled,
    PolicyReloaded,
    ProbingSuspected,
)
from monitor.outcome import Outcome
from monitor.sinks.message import message_of
from monitor.sinks.settings import SinkEvent, SinkKind
from monitor.types import Action, Gap, Mode, ReloadOutcome, ReloadSource
from probes.card import Stage
from tests.unit.audit_trail import content, decision


def test_events_to_choose_from_are_events() -> None:
    """Those of the chain itself (started, stopped, dropped, erased, pruned) and explanations stay in the trail."""
    kinds = {kind.model_fields["kind"].default for kind in get_args(Event)}
    chosen = {event.value for event in SinkEvent}
    assert chosen < kinds
    assert kinds - chosen == {"started", "stopped", "dropped", "erased", "pruned", "explanation"}


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (GapSeen(plan="p", gaps={Gap.UNSEEN: 3}), "positions were not scored: unseen 3"),
        (CanaryFailed(plan="p", reason=CanaryFailure.LATE, detail="12 s"), "the canary fails: late"),
        (
            PolicyReloaded(plan="p", before="q", source=ReloadSource.API, outcome=ReloadOutcome.APPLIED),
            "a policy by api: applied",
        ),
        (
            Handled(plan="p", policy="default", rule="again", action=Action.REGENERATE, outcome=Outcome.SECOND),
            "regenerate by again (policy default): second",
        ),
        (
            ConversationFired(
                plan="p",
                policy="default",
                rule="drift",
                action=Action.BLOCK,
                mode=Mode.ENFORCE,
                detector="harm",
                accumulator="decay",
                value=2.0,
                threshold=1.0,
                requests=3,
                until=None,
            ),
            "a conversation: block by drift (policy default, enforce)\nharm, 3 requests",
        ),
        (
            ProbingSuspected(
                plan="p", policy="default", detector="harm", stage=Stage.PROMPT, requests=9, near=7, benign=0.1
            ),
            "7 of 9 requests lie near a threshold of harm",
        ),
    ],
)
def test_people_are_told_what_happened(event: Event, said: str) -> None:
    text = json.loads(message_of(SinkKind.SLACK, event, None, text=False).body)["text"]
    assert said in text
    assert str(event.id) in text


def test_tokens_of_an_explanation_are_texts_too() -> None:
    about = content(1).model_copy(update={"tokens": ("sword", "fish")})
    for text in (False, True):
        body = message_of(SinkKind.WEBHOOK, decision(), about, text=text).body
        assert (b"sword" in body) == text
