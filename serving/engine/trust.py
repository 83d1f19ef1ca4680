"""Request data that only our own front end may set: policy, format and roles, under a MAC that clients cannot make."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from typing import Any

from monitor.attempt import Attempt
from monitor.rollout import Subjects
from monitor.segments import PromptMap, Run
from monitor.types import PromptEvent, Role
from probes.card import Format

EXTRA_KEY = "telltale"
"""The reserved key in ``SamplingParams.extra_args``."""
KEY_VARIABLE = "TELLTALE_KEY"
"""The MAC key: random at each start, handed down to child processes, never in a configuration that vLLM logs."""
ROLLOUT_VARIABLE = "TELLTALE_ROLLOUT_KEY"
"""The secret that says whom a rule is rolled out to. Whoever runs the server sets it, to the same at every start and in
every replica; else it is made anew, as the MAC key is."""
_CHILD = re.compile(r"^\d+_(?P<parent>.+)$")


@dataclass(frozen=True, slots=True)
class TrustedData:
    """What the front end says about a request.

    Attributes:
        policy: name of its policy; None for the first.
        fmt: how its text reached the model.
        prompt: who wrote which of its prompt's tokens, and where the reply begins.
        canary: it is one of our own canaries, which is scored and judged apart from users' requests.
        reread: it is a flagged request of before, computed by us once more: positions whose whole rows are wanted.
        steers: that it asked for and may have: by their names, the share of their strength.
        subjects: whom it belongs to.
        imposed: names of the rules over conversations that stand against its session.
        plan: digest of the plan that it was signed under: a request keeps it, whatever is loaded meanwhile.
        attempt: which one at an answer it is, and whether somebody withholds the reply.
        refusal: rule and text of a block that is decided already.
        judge: it is our own question about a text, which nobody else sees.
    """

    policy: str | None
    fmt: Format
    prompt: PromptMap
    canary: bool = False
    reread: tuple[int, ...] | None = None
    steers: Mapping[str, float] = field(default_factory=dict)
    subjects: Subjects = field(default_factory=Subjects)
    imposed: tuple[str, ...] = ()
    plan: str | None = None
    attempt: Attempt = Attempt.UNHELD
    refusal: tuple[str, str] | None = None
    judge: bool = False


def ensure_key(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make the key of this server if no parent process has made it."""
    environment.setdefault(KEY_VARIABLE, secrets.token_hex(32))


def ensure_rollout_key(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Make the key of rollouts if nobody has set it.

    Returns: whether it was set.
    """
    was_set = bool(environment.get(ROLLOUT_VARIABLE))
    if not was_set:
        environment[ROLLOUT_VARIABLE] = secrets.token_hex(32)
    return was_set


def rollout_key(environment: Mapping[str, str] = os.environ) -> bytes:
    """The key of rollouts.

    Raises:
        RuntimeError: the process was not started by telltale.
    """
    return _key(ROLLOUT_VARIABLE, environment)


def seal(data: TrustedData, request_id: str, *, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The value to put under ``EXTRA_KEY``."""
    prompt = data.prompt
    content = {
        "policy": data.policy,
        "format": data.fmt.value,
        "runs": [[run.role.value, run.length] for run in prompt.runs] if prompt.runs is not None else None,
        "stream_from": prompt.stream_from,
        "canary": data.canary,
        "reread": list(data.reread) if data.reread is not None else None,
        "steers": dict(data.steers),
        "events": [event.value for event in prompt.events],
        "subjects": asdict(data.subjects),
        "imposed": data.imposed,
        "plan": data.plan,
        "attempt": data.attempt.value,
        "refusal": data.refusal,
        "judge": data.judge,
    }
    body = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {"body": body, "mac": _mac(body, request_id, environment)}


def unseal(value: object, request_id: str, *, environment: Mapping[str, str] = os.environ) -> TrustedData | None:
    """Trusted data of a request, or None if there is none or its MAC is wrong.

    The children of a request with ``n > 1`` carry their parent's data; their ids are the parent's behind a number.
    """
    if (
        not isinstance(value, Mapping)
        or not isinstance(value.get("body"), str)
        or not isinstance(value.get("mac"), str)
    ):
        return None
    child = _CHILD.match(request_id)
    candidates = [request_id, child["parent"]] if child else [request_id]
    # As bytes: of text, only ASCII can be compared, and whoever forges a MAC may write anything.
    mac = value["mac"].encode(errors="replace")
    if not any(hmac.compare_digest(_mac(value["body"], name, environment).encode(), mac) for name in candidates):
        return None
    body: dict[str, Any] = json.loads(value["body"])
    runs = body["runs"]
    prompt = PromptMap(
        runs=tuple(Run(Role(role), length) for role, length in runs) if runs is not None else None,
        stream_from=body["stream_from"],
        events=tuple(PromptEvent(event) for event in body["events"]),
    )
    return TrustedData(
        policy=body["policy"],
        fmt=Format(body["format"]),
        prompt=prompt,
        canary=bool(body["canary"]),
        reread=tuple(body["reread"]) if body["reread"] is not None else None,
        steers=body["steers"],
        subjects=Subjects(**body["subjects"]),
        imposed=tuple(body["imposed"]),
        plan=body["plan"],
        attempt=Attempt(body["attempt"]),
        refusal=(body["refusal"][0], body["refusal"][1]) if body["refusal"] is not None else None,
        judge=bool(body["judge"]),
    )


def _mac(body: str, request_id: str, environment: Mapping[str, str]) -> str:
    key = _key(KEY_VARIABLE, environment)
    return hmac.new(key, f"{request_id}\n{body}".encode(errors="replace"), hashlib.sha256).hexdigest()


def _key(variable: str, environment: Mapping[str, str]) -> bytes:
    key = environment.get(variable, "")
    if not key:
        raise RuntimeError(f"{variable} is not set in this process: its parent was not started by telltale")
    return key.encode()
