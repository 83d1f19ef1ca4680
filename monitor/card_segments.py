"""Whose text a verdict reads: what the rule names, as far as the detector's card allows it."""

from __future__ import annotations

from collections.abc import Sequence

from monitor.thresholds import RuleSite
from monitor.types import Role
from probes.card import Card, Stage


def segments_of(site: RuleSite, named: tuple[Role, ...] | None) -> tuple[Role, ...] | None:
    """The roles that are read, in the order of ``Role``; None reads everything.

    Args:
        site: the verdict.
        named: by the rule.
    Raises:
        PolicyError: the detector was fitted on the text of other roles.
    """
    own = card_segments(site.card)
    if own is None:
        if named is None or site.stage is not Stage.PROMPT:
            return None
        return tuple(role for role in Role if role in named)
    if site.stage is not Stage.PROMPT:
        raise site.error(
            ("stage",),
            f"is {site.stage.value!r}: detector {site.card.name!r} reads what {_names(own)} said in the prompt. Say "
            "stage: prompt.",
        )
    if named is not None and set(named) != set(own):
        raise site.error(
            ("segments",),
            f"is {_names(named)}: detector {site.card.name!r} was fitted on the text of {_names(own)}, and says "
            "nothing about that of others. Leave 'segments' out.",
        )
    return own


def card_segments(card: Card) -> tuple[Role, ...] | None:
    """Whose text a detector is for, by its card; None: it reads everything."""
    return tuple(role for role in Role if role.value in card.segments) or None


def _names(roles: Sequence[Role]) -> str:
    return str([role.value for role in roles])
