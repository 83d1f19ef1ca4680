"""A server whose rules turn to what is not there does not start."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.api.opening import OpeningError, require_destinations
from tests.unit.artifacts import make_card, plan_of, policy_text, unit_artifact


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("{model: tinny}", "policy default, rule away: routes to the model 'tinny'.*mean 'tiny'"),
        ("{upstream: 'https://far.example/v1', key_env: FAR_KEY}", "the variable FAR_KEY, which is not set"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, to: str, message: str) -> None:
    when = "when: {detector: harm, stage: prompt, above: {value: 1}, aggregate: {kind: max}}"
    rule = f"{{name: away, {when}, do: {{action: route, to: {to}}}, mode: enforce}}"
    plan = plan_of(tmp_path, policy_text(rule), {"harm": unit_artifact(make_card())})
    with pytest.raises(OpeningError, match=message):
        require_destinations(plan, {"tiny"}, {"FAR_KEY": ""})
    require_destinations(plan, {"tiny", "tinny"}, {"FAR_KEY": "sk"})
