"""That the rules and detectors which sinks name are there. Knows no network."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from monitor.types import RESERVED_RULES
from probes.errors import did_you_mean

if TYPE_CHECKING:
    from monitor.yaml_file import PolicyFile


def require_known_names(file: PolicyFile, detectors: Collection[str]) -> None:
    """Refuse a sink that waits for what cannot happen.

    Args:
        file: the policy file.
        detectors: names of all that it reads.
    Raises:
        PolicyError: a rule or a detector is not known.
    """
    rules = {rule.name for policy in file.config.policies for rule in policy.rules} | set(RESERVED_RULES)
    for number, sink in enumerate(file.config.sinks):
        for key, given, known in (("rules", sink.rules, rules), ("detectors", sink.detectors, detectors)):
            for place, name in enumerate(given or ()):
                if name not in known:
                    where = ("sinks", number, key, place)
                    raise file.error(where, f"is {name!r}. {did_you_mean(name, known)}")
