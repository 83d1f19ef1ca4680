"""The alerts of a policy file, joined with what they watch: rules, detectors and latents. Knows no Prometheus."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from monitor.alert_entry import AlertEntry
from monitor.check import Check
from monitor.entries import DetectorEntry
from monitor.yaml_file import Place, PolicyFile
from probes.artifact import Artifact
from probes.errors import did_you_mean


class Watched(StrEnum):
    """What flags the requests that an alert counts."""

    RULE = "rule"
    DETECTOR = "detector"
    LATENTS = "latents"


@dataclass(frozen=True, slots=True)
class FlagAlert:
    """One alert of a policy file.

    Attributes:
        watched: what flags.
        names: of the rule, or of the detectors (a pack has several).
        entry: as it stands in the file.
        policy: of a rule; empty for detectors, which are everybody's.
    """

    watched: Watched
    names: tuple[str, ...]
    entry: AlertEntry
    policy: str = ""


def flag_alerts(
    file: PolicyFile, artifacts: Mapping[str, Artifact], judged: Collection[Check]
) -> tuple[FlagAlert, ...]:
    """Every alert of a file, in its order.

    Args:
        file: the policy file.
        artifacts: of its detectors, by the name that rules use.
        judged: every check that some policy keeps.
    Raises:
        PolicyError: an alert tells a sink that the file does not have, or watches what nothing judges.
    """
    return (*_of_detectors(file, artifacts, judged), *_of_rules(file))


def _of_detectors(
    file: PolicyFile, artifacts: Mapping[str, Artifact], judged: Collection[Check]
) -> Iterator[FlagAlert]:
    entries = file.config.detectors
    able = {check.detector for check in judged if check.thresholds}
    for number, entry in enumerate(entries):
        if entry.alert is None:
            continue
        where: Place = ("detectors", number, "alert")
        _require_sink(file, where, entry.alert)
        if entry.pack is not None and sum(other.pack is not None for other in entries) > 1:
            raise file.error(where, "stands at one of several packs. Give the alert to rules that read its detectors.")
        names = _names(file, entry, entries, artifacts)
        if able.isdisjoint(names):
            raise file.error(
                where,
                f"can never fire: no rule compares {names[0]!r} with a threshold, and its card has none. Name it in a "
                "rule (mode: shadow suffices), or calibrate it.",
            )
        watched = Watched.LATENTS if entry.sae is not None else Watched.DETECTOR
        yield FlagAlert(watched, names, entry.alert)


def _of_rules(file: PolicyFile) -> Iterator[FlagAlert]:
    for number, policy in enumerate(file.config.policies):
        for place, rule in enumerate(policy.rules):
            if rule.alert is not None:
                _require_sink(file, ("policies", number, "rules", place, "alert"), rule.alert)
                yield FlagAlert(Watched.RULE, (rule.name,), rule.alert, policy.name)


def _names(
    file: PolicyFile, entry: DetectorEntry, entries: Sequence[DetectorEntry], artifacts: Mapping[str, Artifact]
) -> tuple[str, ...]:
    """What an entry's detectors are called; those of a pack are all that no other entry names."""
    if entry.pack is None:
        return (_name(file, entry, artifacts),)
    others = {_name(file, other, artifacts) for other in entries if other.pack is None}
    return tuple(name for name in artifacts if name not in others)


def _name(file: PolicyFile, entry: DetectorEntry, artifacts: Mapping[str, Artifact]) -> str:
    if entry.name is not None:
        return entry.name
    path = file.resolve(entry.artifact or "")
    return next(name for name, artifact in artifacts.items() if artifact.path.resolve() == path)


def _require_sink(file: PolicyFile, where: Place, entry: AlertEntry) -> None:
    if entry.notify is None:
        return
    known = [sink.name for sink in getattr(file.config, "sinks", ())]
    if entry.notify not in known:
        raise file.error(
            (*where, "notify"),
            f"is {entry.notify!r}. {did_you_mean(entry.notify, known)}"
            if known
            else f"is {entry.notify!r}, and the file has no 'sinks'. Add one of that name, or leave 'notify' out.",
        )
