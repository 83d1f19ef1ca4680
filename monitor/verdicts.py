"""The verdicts that the rules of a policy file rest on: joined with cards and thresholds, each kept once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

from monitor.card_segments import card_segments, segments_of
from monitor.check import Check, LengthLimits
from monitor.condition import NEVER, AllOf, AnyOf, Condition, NotOf, Verdict
from monitor.duration import seconds_of
from monitor.rule import END, Rule
from monitor.session import Conversation
from monitor.thresholds import (
    RuleSite,
    calibrated_aggregate,
    own_limits,
    require_fitting,
    scaling_of,
    target_rates,
    term_aggregate,
    thresholds_of,
)
from monitor.types import Action, Mode
from monitor.weighed import Term, WeighedCheck
from monitor.when import Condition as Written
from monitor.when import Scale, Weighed, When, WhenAll, WhenAny, WhenConversation, WhenNot, WhenWeighed
from monitor.yaml_file import Place, PolicyError, PolicyFile
from probes.aggregate import Aggregator
from probes.bank import Bank
from probes.card import Card, Format, Stage
from probes.detectors import Detector
from probes.errors import did_you_mean

AnyCheck = Check | WeighedCheck
"""One statistic, or a weighted sum of some, and when it fires."""
_KEY_DIGITS = 16


class Verdicts:
    """Collects the checks of a plan while its rules are read.

    Args:
        file: the policy file.
        cards: of its detectors, by name.
        bank: they.

    Attributes:
        bank: as given.
        checks: so far; a condition's verdicts are positions here.
    """

    def __init__(self, file: PolicyFile, cards: Mapping[str, Card], bank: Bank) -> None:
        self.checks: list[AnyCheck] = []
        self._file = file
        self._cards = cards
        self.bank = bank
        self._places: dict[tuple[object, ...], int] = {}

    def condition(self, where: Place, rule: Rule) -> Condition:
        """The condition of a rule.

        Args:
            where: the rule stands.
            rule: it.
        Raises:
            PolicyError: a detector is not known, its card cannot give what the rule asks for, or the action may not
                rest on what is read.
        """
        if isinstance(rule.when, WhenConversation):
            return NEVER
        found = self._compile(where, rule, rule.when, ("when",))
        action = rule.do.action
        if action.severity > Action.ESCALATE.severity and self._is_only_unusual(found):
            read = {name for number in self.read_by(found) for name in self.detectors_of(number)}
            odd = [d for d in (self.bank.detector(name) for name in sorted(read)) if not d.may_block_alone]
            raise self._by_the_unusual(where, rule, odd[0])
        return found

    def second(self, where: Place, rule: Rule) -> Condition | None:
        """The second condition of a rule that escalates to detectors; None of others.

        Raises:
            PolicyError: as for ``condition``.
        """
        probe = rule.do.to.probe if rule.do.to is not None else None
        return None if probe is None else self._compile(where, rule, probe, ("do", "to", "probe"))

    def conversation(self, where: Place, policy: str, rule: Rule) -> Conversation | None:
        """What a rule watches over the requests of a session; None if it is no such rule.

        Args:
            where: the rule stands.
            policy: name of its policy.
            rule: it.
        Raises:
            PolicyError: see ``condition``.
        """
        when = rule.when
        if not isinstance(when, WhenConversation):
            return None
        site = self._site(where, rule, when.detector, ("when",), when.of)
        detector = self.bank.detector(when.detector)
        if rule.do.action.severity > Action.STEER.severity and not detector.may_block_alone:
            raise self._by_the_unusual(where, rule, detector)
        aggregate = when.aggregate or term_aggregate(site)
        require_fitting(site, detector, aggregate)
        segments = segments_of(site, when.segments)
        # No threshold of its own: a single request never makes it fire.
        check = Check.of(
            when.detector, when.of, aggregate, skip_first=site.card.skip_first, limits={}, segments=segments
        )
        made = [site.card.tensors_digest, site.card.parameters, site.card.skip_first]
        read = when.model_dump(mode="json", exclude={"above"})
        content = [policy, rule.name, read, aggregate.config(), segments, made]
        until = rule.do.until or END
        return Conversation(
            key=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS],
            check=self._place(check),
            accumulator=when.accumulate,
            threshold=when.above.value,
            by=when.by,
            lasts=math.inf if until == END else seconds_of(until),
            holds=rule.mode is Mode.ENFORCE and rule.do.action is not Action.FLAG,
            formats=frozenset(site.card.formats),
        )

    def _by_the_unusual(self, where: Place, rule: Rule, odd: Detector) -> PolicyError:
        return self._file.error(
            (*where, "do", "action"),
            f"is {rule.do.action.value!r}, and the rule may fire by {odd.name!r} alone: the kind {odd.kind!r} finds "
            "what is unusual and not what is harmful. No request is stopped by it alone. Let the rule flag, or ask "
            "for 'all' of it and a detector of another kind.",
        )

    def watched(self, name: str) -> list[int]:
        """What is kept of a detector that no rule reads: its calibrated statistics, so that they can be watched."""
        card = self._cards[name]
        grouped: dict[tuple[Stage, Aggregator], dict[Format, float | LengthLimits]] = {}
        for calibration in card.calibrations:
            known = grouped.setdefault((calibration.stage, calibration.aggregate), {})
            known[calibration.format] = own_limits(calibration)
        return [
            self._place(
                Check.of(
                    name, stage, aggregate, skip_first=card.skip_first, limits=limits, segments=card_segments(card)
                )
            )
            for (stage, aggregate), limits in grouped.items()
        ]

    def target_rates(self, rule: Rule, condition: Condition) -> Mapping[Format, float]:
        """The share of benign requests for which a rule may fire, per format, where one calibrated verdict says so."""
        check = self.checks[condition.number] if isinstance(condition, Verdict) else None
        if not isinstance(rule.when, When) or not isinstance(check, Check):
            return {}
        return target_rates(self._cards[check.detector], check, rule.when.above)

    def read_by(self, condition: Condition) -> list[int]:
        """The checks that a condition rests on, in the order of the file, those under a weighted sum included."""
        match condition:
            case Verdict():
                check = self.checks[condition.number]
                terms = [term.check for term in check.terms] if isinstance(check, WeighedCheck) else []
                return [*terms, condition.number]
            case NotOf():
                return self.read_by(condition.part)
            case _:
                return [number for part in condition.parts for number in self.read_by(part)]

    def detectors_of(self, number: int) -> list[str]:
        """The detectors that a check reads."""
        check = self.checks[number]
        return [term.name for term in check.terms] if isinstance(check, WeighedCheck) else [check.detector]

    def _compile(self, where: Place, rule: Rule, when: Written, path: Place) -> Condition:
        match when:
            case When():
                return Verdict(self._verdict(where, rule, when, path))
            case WhenWeighed():
                return Verdict(self._sum(where, rule, when, path))
            case WhenNot():
                return NotOf(self._compile(where, rule, when.negated, (*path, "not")))
            case WhenAll():
                return AllOf(self._each(where, rule, when.all, (*path, "all")))
            case WhenAny():
                return AnyOf(self._each(where, rule, when.any, (*path, "any")))
            case WhenConversation():  # pragma: no cover - the model refuses it among others
                raise AssertionError("a verdict on a conversation stands alone")
            case _:  # pragma: no cover
                assert_never(when)

    def _each(self, where: Place, rule: Rule, parts: Sequence[Written], path: Place) -> tuple[Condition, ...]:
        return tuple(self._compile(where, rule, part, (*path, number)) for number, part in enumerate(parts))

    def _verdict(self, where: Place, rule: Rule, when: When, path: Place) -> int:
        site = self._site(where, rule, when.detector, path, when.stage)
        aggregate = when.aggregate or calibrated_aggregate(site)
        require_fitting(site, self.bank.detector(when.detector), aggregate)
        return self._place(
            Check.of(
                when.detector,
                when.stage,
                aggregate,
                skip_first=site.card.skip_first,
                limits=thresholds_of(site, aggregate, when.above),
                segments=segments_of(site, when.segments),
            )
        )

    def _sum(self, where: Place, rule: Rule, when: WhenWeighed, path: Place) -> int:
        sites = [
            self._site(where, rule, term.detector, (*path, "weigh", number), when.stage)
            for number, term in enumerate(when.weigh)
        ]
        terms = tuple(self._term(site, term, when) for site, term in zip(sites, when.weigh, strict=True))
        formats = [
            fmt
            for fmt in Format
            if all(
                fmt in site.card.formats and (term.scaling is None or fmt in term.scaling)
                for site, term in zip(sites, terms, strict=True)
            )
        ]
        if not formats:
            raise self._file.error(
                (*where, *path, "weigh"),
                "there is no format in which all of these detectors can be added up (chat, raw). Leave one of them "
                "out, or calibrate them for the same formats.",
            )
        limits = MappingProxyType(dict.fromkeys(formats, when.above.value))
        return self._place(WeighedCheck(when.stage, terms, limits))

    def _term(self, site: RuleSite, term: Weighed, when: WhenWeighed) -> Term:
        detector = self.bank.detector(term.detector)
        aggregate = term.aggregate or term_aggregate(site)
        require_fitting(site, detector, aggregate)
        scaling = scaling_of(site, aggregate) if when.sum is Scale.PROBABILITY else None
        factors = [1.0] if scaling is None else [logistic.slope for logistic in scaling.values()]
        if when.stage is Stage.STREAM and any(term.weight * factor <= 0 for factor in factors):
            raise site.error(
                ("weight",),
                f"is {term.weight:g}: at the stage 'stream' the sum is judged at every token and may only rise, so "
                "that more of each statistic must make more of it. Use a positive weight, or 'all' with 'not' for what "
                "speaks against.",
            )
        # No threshold of its own: it never fires.
        check = Check.of(
            term.detector,
            when.stage,
            aggregate,
            skip_first=site.card.skip_first,
            limits={},
            segments=segments_of(site, term.segments),
        )
        return Term(self._place(check), term.detector, term.weight, scaling)

    def _site(self, where: Place, rule: Rule, name: str, path: Place, stage: Stage) -> RuleSite:
        if name not in self._cards:
            raise self._file.error((*where, *path, "detector"), f"is {name!r}. {did_you_mean(name, self._cards)}")
        entries = self._file.config.detectors
        latents = next((entry for entry in entries if entry.sae is not None and entry.name == name), None)
        return RuleSite(self._file, where, rule, path, stage, self._cards[name], latents)

    def _place(self, check: AnyCheck) -> int:
        key = check.key()
        if key not in self._places:
            self._places[key] = len(self.checks)
            self.checks.append(check)
        return self._places[key]

    def _is_only_unusual(self, condition: Condition) -> bool:
        """Whether it can become true by nothing but detectors that may not block alone."""
        match condition:
            case Verdict():
                names = self.detectors_of(condition.number)
                return not any(self.bank.detector(name).may_block_alone for name in names)
            case NotOf():
                return self._is_only_unusual(condition.part)
            case AllOf():
                # That something else was not found speaks for nothing: beside it, the rest has to do.
                found = [part for part in condition.parts if not isinstance(part, NotOf)]
                return all(self._is_only_unusual(part) for part in found or condition.parts)
            case AnyOf():
                return any(self._is_only_unusual(part) for part in condition.parts)
