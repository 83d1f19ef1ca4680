"""What the front end seals into a request: the policy and the subjects of whoever sent it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput

from monitor.attempt import Attempt
from monitor.report import StepReport, encode_report
from monitor.rollout import Subjects
from probes.card import Format
from serving.engine.carrier import CARRIER_ID
from serving.engine.frontend import Frontend
from serving.engine.trust import EXTRA_KEY, KEY_VARIABLE, TrustedData, unseal
from serving.hold import Hold
from serving.origin import Caller, Origin, enter_origin, leave_origin
from serving.sitting import Reading, Sitting
from tests.unit.test_records import Engine
from tests.unit.test_steers import CALM, compiled, do


def signed(folder: Path, origin: Origin | None, **xargs: Any) -> TrustedData | None:
    """A request as vLLM hands it over once its id is known: signed, sent, and opened again by one of its choices."""
    request = sent(folder, origin, **xargs)
    return unseal(request.sampling_params.extra_args[EXTRA_KEY], "1_chatcmpl-1-abcdef")


def sent(folder: Path, origin: Origin | None, *, cache_salt: str | None = None, **xargs: Any) -> Any:
    """A request as it leaves the front end."""
    frontend = Frontend()
    mild = CALM.replace("name: calm", "name: mild")
    plan = compiled(folder, f"{CALM}, {mild}", do("r", "{action: flag}"), policy="on_request: [mild]")
    frontend.configure(SimpleNamespace(plan=plan))  # type: ignore[arg-type]
    request: Any = SimpleNamespace(
        sampling_params=SamplingParams(n=2, extra_args=dict(xargs)),
        resumable=False,
        prompt_embeds=None,
        prompt_token_ids=[1, 2, 3],
        cache_salt=cache_salt,
        external_req_id="chosen-by-the-client",
        request_id="chatcmpl-1-abcdef",
    )
    token = enter_origin(origin) if origin is not None else None
    try:
        frontend.sign(request)
    finally:
        if token is not None:
            leave_origin(token)
    return request


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 64)


def test_policy_and_subjects_are_the_callers(tmp_path: Path) -> None:
    found = signed(tmp_path, Origin(Format.CHAT, Caller("acme", "a session", "strict@acme")))
    assert found is not None
    assert (found.policy, found.fmt) == ("strict@acme", Format.CHAT)
    assert found.subjects == Subjects("acme", "a session", "chatcmpl-1-abcdef")


def test_what_stands_against_the_session_is_sealed_in_and_its_end_is_waited_for(tmp_path: Path) -> None:
    taken = Taken()
    sitting = Sitting("acme", {}, ("stop", "note"), taken.commit)
    found = signed(tmp_path, Origin(Format.CHAT, Caller("acme", "s"), sitting))
    assert found is not None
    assert found.imposed == ("stop", "note")
    assert signed(tmp_path, Origin(Format.CHAT, Caller("acme", "s"))).imposed == ()  # type: ignore[union-attr]


def test_our_own_question_about_a_request_is_no_request_of_its_session(tmp_path: Path) -> None:
    engine, frontend, taken = Engine(tmp_path), Frontend(), Taken()
    frontend.configure(SimpleNamespace(plan=engine.monitor.plan))  # type: ignore[arg-type]
    sitting = Sitting("t", {}, ("stop",), taken.commit)
    frontend.questions.add("a question")
    token = enter_origin(Origin(Format.CHAT, Caller("t", "s"), sitting))
    for name, imposed, waiting in (("a question", (), 0), ("a user's", ("stop",), 1)):
        request: Any = SimpleNamespace(
            sampling_params=SamplingParams(), resumable=False, prompt_embeds=None, prompt_token_ids=[1],
            external_req_id=name, request_id=f"{name}-1", cache_salt=None,
        )  # fmt: skip
        frontend.sign(request)
        found = unseal(request.sampling_params.extra_args[EXTRA_KEY], request.request_id)
        assert found is not None
        assert (found.imposed, len(frontend._turns)) == (imposed, waiting)
    leave_origin(token)


def test_a_session_hears_of_a_request_once_the_engine_has_said_its_last_word(tmp_path: Path) -> None:
    """Two choices, of which the API process makes no last output: their client has left."""
    engine, frontend, taken = Engine(tmp_path), Frontend(), Taken()
    frontend.configure(SimpleNamespace(plan=engine.monitor.plan))  # type: ignore[arg-type]
    token = enter_origin(Origin(Format.CHAT, Caller("t", "s"), Sitting("t", {}, (), taken.commit)))
    request: Any = SimpleNamespace(
        sampling_params=SamplingParams(n=2), resumable=False, prompt_embeds=None, prompt_token_ids=[1, 2],
        external_req_id="x", request_id="chatcmpl-x", cache_salt=None,
    )  # fmt: skip
    frontend.sign(request)
    leave_origin(token)

    async def run() -> None:
        for name in ("0_chatcmpl-x", "1_chatcmpl-x", "other"):
            engine.admit(name, 2)
        for step in (
            {"0_chatcmpl-x": (0, [0, 0.5]), "1_chatcmpl-x": (0, [0, 0.5])},
            {"0_chatcmpl-x": (2, [1.5]), "1_chatcmpl-x": (2, [0.25])},
        ):
            deliver(frontend, engine.step(step))
        deliver(frontend, engine.step({"other": (0, [0])}, ends={"0_chatcmpl-x": (3, 1), "1_chatcmpl-x": (3, 1)}))
        await asyncio.sleep(0)
        assert not taken.readings
        deliver(frontend, engine.step({"other": (1, [0])}))
        await asyncio.sleep(0)

    asyncio.run(run())
    (reading,) = taken.readings
    assert (reading.request_id, reading.fmt) == ("chatcmpl-x", Format.CHAT)
    assert reading.statistics == [0.5, 1.5]  # the prompt's, and the larger one of the replies'


def deliver(frontend: Frontend, report: StepReport) -> None:
    carrier = EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=encode_report(report))
    assert frontend.take_out([carrier]) == []


class Taken:
    """Keeps what a sitting is given."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    async def commit(self, sitting: Sitting, reading: Reading) -> None:
        self.readings.append(reading)


def test_of_whom_nothing_is_known_the_first_policy_judges(tmp_path: Path) -> None:
    found = signed(tmp_path, None)
    assert found is not None
    assert (found.policy, found.subjects) == (None, Subjects("", "", "chatcmpl-1-abcdef"))


def test_a_steer_is_asked_of_the_callers_policy(tmp_path: Path) -> None:
    found = signed(tmp_path, Origin(Format.CHAT, Caller(policy="default")), steer="mild")
    assert found is not None
    assert found.steers == {"mild": 1.0}


def test_nobody_signs_for_himself(tmp_path: Path) -> None:
    with pytest.raises(VLLMValidationError, match="reserved for the server"):
        signed(tmp_path, None, telltale={"body": "{}", "mac": ""})


@pytest.mark.parametrize("opened", [True, False])
def test_what_withholds_a_reply_is_sealed_while_it_does(tmp_path: Path, opened: bool) -> None:
    first = Hold(is_open=opened)
    found = signed(tmp_path, Origin(hold=first))
    assert found is not None
    assert found.attempt is (Attempt.FIRST if opened else Attempt.UNHELD)
    assert first.signed == ([("chatcmpl-1-abcdef", 2)] if opened else [])


def test_a_second_attempt_says_what_is_different(tmp_path: Path) -> None:
    first = Hold(signed=[("the-first", 2)])
    second = first.then(Attempt.SECOND, steers={"calm": 1.0}, refusal=("rule", "No."))
    found = signed(tmp_path, Origin(hold=second), steer="mild")
    assert found is not None
    assert (found.attempt, found.refusal) == (Attempt.SECOND, ("rule", "No."))
    assert found.steers == {"mild": 1.0, "calm": 1.0}
    assert found.subjects.request == "the-first"
    assert second.then(Attempt.SECOND).sign("the-third", 1) == "the-first"


def test_without_anybody_who_withholds_nothing_is_said_of_it(tmp_path: Path) -> None:
    found = signed(tmp_path, Origin())
    assert found is not None
    assert (found.attempt, found.refusal, found.judge) == (Attempt.UNHELD, None, False)


def test_no_tenant_finds_what_is_cached_for_another(tmp_path: Path) -> None:
    def salt(tenant: str, given: str | None) -> Any:
        return sent(tmp_path, Origin(Format.CHAT, Caller(tenant)), cache_salt=given).cache_salt

    acme = salt("acme", None)
    pairs = [("acme", None), ("acme", "s"), ("globex", None), ("globex", "s"), ("globex", acme), ("acme", acme)]
    assert len({salt(*pair) for pair in pairs}) == len(pairs)
    assert salt("acme", None) == acme
    assert [salt("", given) for given in (None, "own")] == [None, "own"]


def test_a_request_keeps_the_plan_that_was_in_force_when_it_came(tmp_path: Path) -> None:
    now = signed(tmp_path, Origin())
    assert now is not None
    earlier = compiled(tmp_path, CALM, do("earlier", "{action: flag}"))
    assert now.plan not in {None, earlier.digest}
    found = signed(tmp_path, Origin(plan=earlier))
    assert found is not None
    assert found.plan == earlier.digest
    with pytest.raises(VLLMValidationError, match="mild"):  # which that plan did not let anybody ask for
        signed(tmp_path, Origin(plan=earlier), steer="mild")
