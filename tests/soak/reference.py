"""The monitor written a second time: one request at a time, from all its readouts at once, by the text of the policy.

It knows no plan, no bank, no state and no step. Whatever it says and the server has not said, one of them is wrong.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ruamel.yaml import YAML

from probes.aggregate import Aggregator, aggregator_kinds
from probes.artifact import Artifact
from probes.detectors import load_detector
from probes.taps import Tap
from tests.unit.naive import UNDEFINED, naive_values

SEVERITY = {"allow": 0, "flag": 1, "block": 2}
Truth = bool | None


@dataclass(frozen=True)
class Recorded:
    """A request as a monitor has read it.

    Attributes:
        request: the engine's id.
        plan: digest of the plan that it was judged by.
        policy: its name.
        num_prompt: prompt tokens.
        stream_from: position where its reply begins.
        positions: that were read, ascending.
        readouts: (positions, columns) float32.
    """

    request: str
    plan: str
    policy: str
    num_prompt: int
    stream_from: int
    positions: tuple[int, ...]
    readouts: npt.NDArray[np.float32]


def recorded(folder: Path) -> list[Recorded]:
    """All requests that were written down."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            rows = np.frombuffer(base64.b64decode(entry["rows"]), dtype=np.float32)
            found.append(
                Recorded(
                    entry["request"], entry["plan"], entry["policy"], entry["num_prompt"], entry["stream_from"],
                    tuple(entry["positions"]), rows.reshape(len(entry["positions"]), entry["width"]),
                )
            )  # fmt: skip
    return found


@dataclass(frozen=True)
class Judged:
    """What should have been decided.

    Attributes:
        action: the most severe that is enforced.
        rule: what decides it; None where nothing does.
        fired: rules that fire, those in shadow too, up to the token at which the request is blocked.
        statistics: by detector, stage and aggregate: the number at the end.
    """

    action: str
    rule: str | None
    fired: frozenset[str]
    statistics: Mapping[tuple[str, str, str], float]


class Reference:
    """A policy file, read as its page says.

    Args:
        text: of the file.
        folder: that its artifacts lie in.
        columns: by detector and tap, the columns of a row.
    """

    def __init__(self, text: str, folder: Path, columns: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        self._tree: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
        self._columns = columns
        self._artifacts = {
            artifact.card.name: artifact
            for artifact in (Artifact.load(folder / entry["artifact"]) for entry in self._tree["detectors"])
        }
        self._detectors = {name: load_detector(artifact) for name, artifact in self._artifacts.items()}

    def judge(self, request: Recorded) -> Judged:
        """What the policy says of a request."""
        (policy,) = [policy for policy in self._tree["policies"] if policy["name"] == request.policy]
        case = _Case(self, request)
        action, decides, fired = "allow", None, set[str]()
        moments = [(seen, False) for seen in range(request.num_prompt, case.length + 1)] + [(case.length, True)]
        for seen, ended in moments:
            for rule in policy["rules"]:
                if rule["name"] in fired or case.truth(rule["when"], seen, ended=ended) is not True:
                    continue
                fired.add(rule["name"])
                does = rule["do"]["action"]
                if rule["mode"] == "enforce" and SEVERITY[does] > SEVERITY[action]:
                    action, decides = does, rule["name"]
            if action == "block":
                break
        return Judged(action, decides, frozenset(fired), case.statistics())

    def scores(self, name: str, request: Recorded) -> list[float]:
        """Of one detector at each position, a row at a time."""
        detector = self._detectors[name]
        columns = {Tap.parse(tap): at for tap, at in self._columns[name].items()}
        return [
            float(detector.score({tap: row[None, at].astype(float) for tap, at in columns.items()})[0])
            for row in request.readouts
        ]

    def skip_first(self, name: str) -> int:
        """Leading positions that are not read."""
        return self._artifacts[name].card.skip_first

    def verdicts(self, request: Recorded) -> list[dict[str, Any]]:
        """Every verdict that a rule of the request's policy looks at."""
        (policy,) = [policy for policy in self._tree["policies"] if policy["name"] == request.policy]
        return [verdict for rule in policy["rules"] for verdict in _leaves(rule["when"])]


class _Case:
    """One request before the policy."""

    def __init__(self, reference: Reference, request: Recorded) -> None:
        self._reference = reference
        self._request = request
        assert request.positions == tuple(range(len(request.positions))), "a position was never read"
        self.length = len(request.positions)
        self._series: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        self._scores: dict[str, list[float]] = {}

    def truth(self, when: Mapping[str, Any], seen: int, *, ended: bool) -> Truth:
        """Kleene's strong logic over what is known after ``seen`` positions."""
        if "not" in when:
            inner = self.truth(when["not"], seen, ended=ended)
            return None if inner is None else not inner
        for key, decides in (("all", False), ("any", True)):
            if key in when:
                found = [self.truth(part, seen, ended=ended) for part in when[key]]
                return decides if decides in found else (None if None in found else not decides)
        fires = self._value(when, seen) > when["above"]["value"]
        match when["stage"]:
            case "prompt":
                return fires if seen >= self._request.num_prompt else None
            case "stream":
                return True if fires else (False if ended else None)
            case _:
                return fires if ended else None

    def statistics(self) -> dict[tuple[str, str, str], float]:
        """All of them, at the end."""
        return {_key(verdict): self._value(verdict, self.length) for verdict in self._reference.verdicts(self._request)}

    def _value(self, verdict: Mapping[str, Any], seen: int) -> float:
        values = [value for position, value in self._values(verdict) if position < seen]
        if not values:
            return UNDEFINED
        return max(values) if verdict["stage"] == "stream" else values[-1]

    def _values(self, verdict: Mapping[str, Any]) -> list[tuple[int, float]]:
        """The statistic behind each position that is read."""
        key = _key(verdict)
        if key not in self._series:
            name, request = verdict["detector"], self._request
            if name not in self._scores:
                self._scores[name] = self._reference.scores(name, request)
            start, end = self._reference.skip_first(name), self.length
            if verdict["stage"] == "prompt":
                end = min(end, request.num_prompt)
            else:
                start = max(start, request.stream_from)
            values = naive_values(aggregator_of(verdict), self._scores[name][start:end])
            self._series[key] = list(zip(range(start, end), values, strict=True))
        return self._series[key]


def aggregator_of(verdict: Mapping[str, Any]) -> Aggregator:
    """As the file spells it."""
    kind = aggregator_kinds()[verdict["aggregate"]["kind"]]
    return kind(**{name: value for name, value in verdict["aggregate"].items() if name != "kind"})


def _key(verdict: Mapping[str, Any]) -> tuple[str, str, str]:
    return verdict["detector"], verdict["stage"], str(aggregator_of(verdict))


def _leaves(when: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "not" in when:
        return _leaves(when["not"])
    for key in ("all", "any"):
        if key in when:
            return [leaf for part in when[key] for leaf in _leaves(part)]
    return [dict(when)]
