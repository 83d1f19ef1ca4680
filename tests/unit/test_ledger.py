"""From what the API process learns to events: the reply's figures, one event a request, texts as the policy says."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.v1.engine import EngineCoreOutput

from monitor.audit.errors import AuditError
from monitor.audit.redaction import KeptTexts, personal_data
from monitor.audit.settings import AuditSettings, TextKept
from monitor.audit.store import open_store
from monitor.audit.writer import AuditWriter
from monitor.canary import CanaryFailure, Failed
from monitor.events import CanaryFailed, Content, Decision, Event, GapSeen, PolicyReloaded, Started
from monitor.report import encode_report
from monitor.rollout import Subjects
from monitor.types import Action, Gap, Mode, ReloadOutcome, ReloadSource, Skip
from monitor.yaml_file import PolicyError
from serving.engine.carrier import CARRIER_ID
from serving.engine.frontend import Frontend
from serving.engine.ledger import Ending, Ledger, TokenIds
from tests.unit.artifacts import policy_text, rule, write_policy
from tests.unit.audit_trail import KEY, Watch, settings_of
from tests.unit.test_records import Engine

WORDS = ("<s>", "mail", "ann@example.org", "or", "+49 170 1234567")


def decode(tokens: TokenIds) -> str:
    return " ".join(WORDS[token] for token in tokens)


def shout(text: str) -> str:
    """A redaction hook."""
    return text.upper()


def fail(text: str) -> str:
    """A redaction hook that does not work."""
    raise KeyError(text)


def mute(text: str) -> int:
    """A redaction hook that gives back no text."""
    return len(text)


class Trail:
    """A ledger that writes to a folder, and an engine whose records it enters."""

    def __init__(self, folder: Path, *, rules: str = "", **changes: object) -> None:
        self.engine = Engine(folder, rules=rules)
        self._settings: AuditSettings = settings_of("jsonl", folder, **changes)
        self._writer = AuditWriter(open_store(self._settings.url, make=True), KEY, self._settings, Watch())
        self._writer.start(Started(program="test"))
        plan = self.engine.monitor.plan
        self.plan = plan
        self.ledger = Ledger(plan, self._writer, KeptTexts(self._settings), decode)

    def events(self) -> list[tuple[Event, Content | None]]:
        """All but the first and the last."""
        assert self._writer.close()
        store = open_store(self._settings.url)
        (writer,) = store.writers()
        return [(stored.event, stored.content) for stored in store.read(writer)][1:-1]


def test_an_event_says_what_the_record_says(tmp_path: Path) -> None:
    trail = Trail(tmp_path, text="full")
    engine = trail.engine
    engine.admit("a-1", 3)
    engine.step({"a-1": (0, [0, 1.5, 0])})
    engine.step({"a-1": (3, [0.5])})
    engine.step({"a-1": (4, [2.5])}, ends={"a-1": (6, 3)})
    ending = Ending("a-1", "a", prompt=(0, 1, 2), reply=(3, 4, 4), finish_reason="content_filter")
    ticket = trail.ledger.ended(engine.record("a-1"), ending)
    assert ticket is not None
    ticket.result(timeout=10)
    ((event, content),) = trail.events()
    assert isinstance(event, Decision)
    assert (event.plan, event.policy) == (trail.plan.digest, "default")
    assert event.artifacts == {"harm": trail.plan.cards["harm"].tensors_digest}
    assert (event.action, event.rule) == (Action.BLOCK, "stream")
    assert [(acted.name, acted.action, acted.mode) for acted in event.rules] == [
        ("prompt", Action.FLAG, Mode.ENFORCE),
        ("stream", Action.BLOCK, Mode.ENFORCE),
    ]
    said = [(v.stage.value, v.statistic, v.threshold, v.fired, v.fired_at) for v in event.verdicts]
    assert said == [("prompt", 1.5, 1.0, True, 2), ("stream", 2.5, 2.0, True, 4)]
    account = event.coverage
    assert (account.positions, account.scored, account.skipped, account.gaps) == (
        6,
        4,
        {Skip.SINK: 1, Skip.FINAL: 1},
        {},
    )
    assert (event.prompt_tokens, event.reply_tokens, event.finish_reason) == (3, 3, "content_filter")
    assert content == Content(
        request_id="a-1",
        client_request_id="a",
        prompt="<s> mail ann@example.org",
        reply="or +49 170 1234567 +49 170 1234567",
    )


def test_a_reply_that_ends_outside_the_engine_says_the_same(tmp_path: Path) -> None:
    """A stop string: the engine has not closed its account yet."""
    trail = Trail(tmp_path)
    engine = trail.engine
    engine.admit("a", 3)
    engine.step({"a": (0, [0, 1.5, 0])})
    engine.step({"a": (3, [0.5])})
    record = engine.record("a")
    record.close(5)
    trail.ledger.ended(record, Ending("a", "a", prompt=(0, 1, 2), reply=(3, 4), finish_reason="stop"))
    ((event, _),) = trail.events()
    assert isinstance(event, Decision)
    assert (event.action, event.rule, [acted.name for acted in event.rules]) == (Action.FLAG, "prompt", ["prompt"])
    assert (event.coverage.positions, event.coverage.scored) == (5, 3)
    assert event.verdicts[0].fired_at == 2


NEW = "aggregate: {kind: max}, above"
OF_FEW = "rollout: {percent: 0.001, by: tenant}"
QUIET = f"name: quiet, when: {{not: {{detector: harm, stage: stream, {NEW}: {{value: 2}}}}}}, do: {{action: flag}}"
SOME = f"name: some, when: {{detector: harm, stage: prompt, {NEW}: {{value: 1}}}}, do: {{action: block}}"


def test_a_joined_rule_and_one_outside_of_its_rollout_at_a_stop_string(tmp_path: Path) -> None:
    """What the reply's end makes true is in the event; a rule that is enforced for others was in shadow."""
    trail = Trail(tmp_path, rules=f"{{{QUIET}, mode: enforce}}\n{{{SOME}, mode: enforce, {OF_FEW}}}")
    engine = trail.engine
    engine.admit("a", 3, Subjects(tenant="ours"))
    engine.step({"a": (0, [0, 1.5, 0])})
    engine.step({"a": (3, [0.5])})
    record = engine.record("a")
    record.close(5)
    trail.ledger.ended(record, Ending("a", "a", prompt=(0, 1, 2), reply=(3, 4), finish_reason="stop", tenant="ours"))
    ((event, content),) = trail.events()
    assert isinstance(event, Decision)
    assert [(acted.name, acted.action, acted.mode) for acted in event.rules] == [
        ("quiet", Action.FLAG, Mode.ENFORCE),
        ("some", Action.BLOCK, Mode.SHADOW),
    ]
    assert (event.action, event.rule) == (Action.FLAG, "quiet")
    assert content is not None
    assert content.tenant == "ours"


def test_nothing_has_fired_and_a_rule_for_others_is_still_told_in_shadow(tmp_path: Path) -> None:
    trail = Trail(tmp_path, rules=f"{{{QUIET}, mode: enforce, {OF_FEW}}}")
    engine = trail.engine
    engine.admit("a", 3, Subjects(tenant="ours"))
    engine.step({"a": (0, [0, 0.5, 0])})
    record = engine.record("a")
    record.close(4)
    trail.ledger.ended(record, Ending("a", "a", prompt=(0, 1, 2), reply=(3,), finish_reason="stop"))
    ((event, _),) = trail.events()
    assert isinstance(event, Decision)
    assert [(acted.name, acted.mode) for acted in event.rules] == [("quiet", Mode.SHADOW)]
    assert (event.action, event.rule) == (Action.ALLOW, None)


def test_gaps_canaries_and_unknown_statistics(tmp_path: Path) -> None:
    trail = Trail(tmp_path)
    engine = trail.engine
    engine.admit("a", 3)
    report = engine.step({"a": (0, [0, float("nan"), 0])}, ends={"a": (3, 0)})
    assert report.tally is not None
    trail.ledger.gaps(report.tally.gaps)
    trail.ledger.canary_failed(Failed(CanaryFailure.LATE, "canary: 12 s"))
    trail.ledger.ended(engine.record("a"), Ending("a"))
    (gap, _), (canary, _), (event, content) = trail.events()
    assert isinstance(gap, GapSeen)
    assert gap.gaps == {Gap.NOT_FINITE: 1}
    assert isinstance(canary, CanaryFailed)
    assert (canary.reason, canary.detail) == (CanaryFailure.LATE, "canary: 12 s")
    assert isinstance(event, Decision)
    assert event.coverage.gaps == {Gap.NOT_FINITE: 1}
    assert [(acted.name, acted.action) for acted in event.rules] == [("on_gap", Action.FLAG)]
    assert event.verdicts[1].statistic is None
    assert (event.prompt_tokens, event.finish_reason) == (None, None)
    assert content == Content(request_id="a")


def test_the_front_end_enters_each_request_once(tmp_path: Path) -> None:
    """What vLLM makes no last output for is entered when its record leaves, or when the engine has ended."""
    trail = Trail(tmp_path)
    engine, frontend = trail.engine, Frontend()
    frontend.configure(SimpleNamespace(plan=trail.plan))  # type: ignore[arg-type]
    frontend.enter_into(trail.ledger)
    for name in ("gone", "going"):
        engine.admit(name, 2)
    reports = [
        engine.step({"gone": (0, [0, math.nan]), "going": (0, [0, 0])}),
        engine.step({"going": (2, [0])}, ends={"gone": (2, 0)}),
        engine.step({"going": (3, [0])}),
        engine.step({"going": (4, [0])}),
    ]
    for report in reports:
        carrier = EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=encode_report(report))
        assert frontend.take_out([carrier]) == []
    frontend.abandon()
    frontend.abandon()
    events = trail.events()
    assert [event.kind for event, _ in events] == ["gap", "decision", "decision"]
    assert [content.request_id for _, content in events if content is not None] == ["gone", "going"]


@pytest.mark.parametrize(
    ("changes", "flagged", "expected"),
    [
        ({"text": "none"}, True, (None, None)),
        ({"text": "flagged"}, False, (None, None)),
        ({"text": "flagged"}, True, ("mail ann@example.org", None)),
        ({"text": "full"}, False, ("mail ann@example.org", None)),
        ({"text": "redacted"}, False, ("mail [email]", None)),
        ({"text": "redacted", "redact": f"{__name__}:shout"}, False, ("MAIL ANN@EXAMPLE.ORG", None)),
        ({"text": "redacted", "redact": f"{__name__}:fail"}, True, (None, "the redaction hook raised KeyError")),
        ({"text": "redacted", "redact": f"{__name__}:mute"}, True, (None, "the redaction hook returned int, not str")),
    ],
)
def test_texts_are_kept_as_the_policy_says(
    tmp_path: Path, changes: dict[str, str], flagged: bool, expected: tuple[str | None, str | None]
) -> None:
    trail = Trail(tmp_path, **changes)
    trail.engine.admit("a", 2)
    trail.engine.step({"a": (0, [0, 1.5 if flagged else 0])}, ends={"a": (2, 0)})
    trail.ledger.ended(trail.engine.record("a"), Ending("a", "a", prompt=(1, 2), reply=(), finish_reason="stop"))
    ((_, content),) = trail.events()
    assert content is not None
    assert (content.prompt, content.withheld) == expected
    kept = b"".join(path.read_bytes() for path in (tmp_path / "trail").iterdir())
    assert (b"ann@example" in kept.lower()) == bool(expected[0] and "@" in expected[0])


@pytest.mark.parametrize("hook", ["nowhere:function", f"{__name__}:nothing", f"{__name__}:WORDS"])
def test_a_hook_that_is_none_is_refused_at_the_start(tmp_path: Path, hook: str) -> None:
    with pytest.raises(AuditError, match="MODULE:FUNCTION"):
        KeptTexts(settings_of("jsonl", tmp_path, text="redacted", redact=hook))
    assert KeptTexts(settings_of("jsonl", tmp_path, text="none", redact=hook)).keeps(flagged=True) is False


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to ann.b+c@mail.example.org!", "write to [email]!"),
        ("call +49 (170) 123-4567 or 030/1234567", "call [number] or [number]"),
        ("4111 1111 1111 1111", "[number]"),
        ("DE89 3704 0044 0532 0130 00", "[iban]"),
        ("from 192.168.0.1 in 2024", "from [ip] in 2024"),
        ("nothing of the kind: 12 apples, v1.2.3", "nothing of the kind: 12 apples, v1.2.3"),
    ],
)
def test_personal_data_is_replaced(text: str, left: str) -> None:
    assert personal_data(text) == left
    assert personal_data(left) == left


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        ("{url: 'mysql://x'}", "must begin with sqlite:///"),
        ("{durability: before_release, on_full: drop}", "promises each"),
        ("{text: all}", "Known: flagged, full, none, redacted"),
        ("{retention: 3h}", "a whole number of days"),
        ("{queu: 3}", "Did you mean 'queue'"),
        ("{redact: 'a b'}", "MODULE:FUNCTION"),
    ],
)
def test_wrong_settings_are_refused_with_their_line(tmp_path: Path, audit: str, said: str) -> None:
    text = policy_text(rule("stop")) + f"audit: {audit}\n"
    with pytest.raises(PolicyError, match=r"telltale.yaml:\d+: audit") as error:
        write_policy(tmp_path, text)
    assert said in str(error.value)


def test_settings_have_defaults_that_keep_what_they_promise(tmp_path: Path) -> None:
    file = write_policy(tmp_path, policy_text(rule("stop")) + "audit: {}\n")
    assert file.config.audit is not None
    settings = file.config.audit.resolved(tmp_path)
    assert settings.url == f"sqlite:///{tmp_path}/telltale.db"
    assert settings.key_file == f"{tmp_path}/audit.key"
    assert (settings.text, settings.blocks_on_error, settings.retention_days) == (TextKept.NONE, True, None)
    absolute = AuditSettings(url="jsonl:////var/audit", key_file="/run/key").resolved(tmp_path)
    assert (absolute.url, absolute.key_file) == ("jsonl:////var/audit", "/run/key")
    server = AuditSettings(url="postgresql://u@h/d").resolved(tmp_path)
    assert server.url == "postgresql://u@h/d"


@pytest.mark.parametrize("outcome", list(ReloadOutcome))
def test_each_attempt_to_change_the_policy_is_written_down(tmp_path: Path, outcome: ReloadOutcome) -> None:
    trail = Trail(tmp_path)
    before, wanted = trail.plan.digest, "f" * 64
    trail.ledger.policy_reloaded(
        PolicyReloaded(plan=wanted, before=before, source=ReloadSource.API, outcome=outcome, setting=None)
    )
    trail.ledger.gaps({"unseen": 1})
    (changed, _), (gap, _) = trail.events()
    assert isinstance(changed, PolicyReloaded)
    assert (changed.plan, changed.before, changed.outcome) == (wanted, before, outcome)
    assert isinstance(gap, GapSeen)
    assert gap.plan == (wanted if outcome is ReloadOutcome.APPLIED else before)
