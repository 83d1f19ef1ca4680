"""What a client may say about steering: the name of an allowed steer, and a strength within the policy's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from monitor.policy import Plan
from probes.errors import TelltaleError, did_you_mean

STEER_KEY: Final = "steer"
STRENGTH_KEY: Final = "steer_strength"
"""In ``vllm_xargs``."""


class SteerRequestError(TelltaleError, ValueError):
    """A request asks for a steer that it may not have."""


def asked_steers(extra: Mapping[str, Any], plan: Plan, policy: int) -> dict[str, float]:
    """What a request asks for: by the steer's name, the share of its strength.

    Args:
        extra: the client's ``vllm_xargs``.
        plan: what is served.
        policy: the position of the request's policy.
    Raises:
        SteerRequestError: the steer is not one that requests of this policy may ask for, or the strength lies
            outside of what the policy file gives it.
    """
    if STEER_KEY not in extra:
        if STRENGTH_KEY in extra:
            raise SteerRequestError(f"{STRENGTH_KEY} is given without {STEER_KEY}, the name of a steer.")
        return {}
    steers = {plan.steering.steers[number].name: number for number in plan.policies[policy].on_request}
    name = extra[STEER_KEY]
    if not steers:
        raise SteerRequestError(
            f"{STEER_KEY} is {name!r}; the policy lets requests ask for no steer. Leave it out; whoever runs the "
            "server can list steers under the policy's 'on_request'."
        )
    if not isinstance(name, str) or name not in steers:
        raise SteerRequestError(f"{STEER_KEY} is {name!r}. {did_you_mean(str(name), steers)}")
    if STRENGTH_KEY not in extra:
        return {name: 1.0}
    strength, full = extra[STRENGTH_KEY], plan.steering.steers[steers[name]].strength
    if full is None:
        raise SteerRequestError(f"{STRENGTH_KEY}: the steer {name!r} has no strength. Leave it out.")
    share = strength / full if isinstance(strength, int | float) and not isinstance(strength, bool) else 0.0
    if not 0 < share <= 1:
        bounds = f"above 0 to {full:g}" if full > 0 else f"{full:g} to below 0"
        raise SteerRequestError(f"{STRENGTH_KEY} is {strength!r}; the steer {name!r} takes {bounds}.")
    return {name: share}
