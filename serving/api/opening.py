"""Opens what rules that escalate or route turn to, and refuses to start where that is not there."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from monitor.compiled import CompiledRule
from monitor.policy import Plan
from probes.errors import TelltaleError, did_you_mean
from serving.api.classifier import Classifier
from serving.api.desk import Desk
from serving.api.opinions import Opinions
from serving.api.upstream import Upstream
from serving.engine.frontend import Frontend
from serving.engine.judge import EngineJudge


class OpeningError(TelltaleError, ValueError):
    """A rule turns to something that this server does not have."""


def open_desk(engine: Any, frontend: Frontend, environment: Mapping[str, str] = os.environ) -> Desk:
    """What the layer that withholds replies works with.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process.
        environment: where API keys stand.
    """
    # A copy: to keep special tokens out of a text, its settings are changed while others make tokens of prompts.
    tokenizer = copy.deepcopy(engine.get_tokenizer())

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    judge = EngineJudge(engine, frontend, tokenizer)
    return Desk(Opinions(judge, Classifier(environment), decode), Upstream(environment), frontend)


def require_destinations(plan: Plan, models: Collection[str], environment: Mapping[str, str]) -> None:
    """Refuse rules that turn to what is not there.

    Raises:
        OpeningError: names policy, rule and key.
    """
    for where, rule in _rules(plan):
        to = rule.handling.do.to if rule.handling is not None else None
        if to is None:
            continue
        if to.model is not None and to.upstream is None and to.model not in models:
            raise OpeningError(
                f"{where}: routes to the model {to.model!r}, which this server does not serve. "
                f"{did_you_mean(to.model, models)} Or name an 'upstream' that serves it."
            )
        if to.key_env is not None and not environment.get(to.key_env):
            raise OpeningError(f"{where}: the API key is to stand in the variable {to.key_env}, which is not set.")


def _rules(plan: Plan) -> Iterator[tuple[str, CompiledRule]]:
    for policy in plan.policies:
        for rule in policy.rules:
            yield f"policy {policy.name}, rule {rule.name}", rule
