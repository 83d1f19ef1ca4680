"""The rows of a recipe, on their sides: to fit on, to calibrate on, to measure on. No text stands on two sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from probes.errors import TelltaleError
from probes.fit.rows.example import Example, without_dropped, without_duplicates
from probes.fit.rows.small_talk import add_small_talk
from probes.fit.rows.split import hold_out, match_negatives, vary_form
from probes.fit.sources import Source, SourceContext
from probes.fit.training.recipe import Recipe

__all__ = ["Dataset", "DatasetError", "build_dataset", "count_sources"]

_MIN_PER_CLASS = 20
_UNSEEN_GROUPS = "unseen_groups"


class DatasetError(TelltaleError, ValueError):
    """A recipe's sets do not give the rows that training needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Rows by use.

    Attributes:
        train: both labels, negatives matched to positives.
        calibration: benign, drawn at random from what was held out.
        pairs: development rows of other sources, both labels.
        hard_benign: development rows, benign.
        apart: further sets with both labels that are measured on, by name; among them ``unseen_groups``, the
            positives and negatives of the groups that were held out for calibration, where both labels share groups.
    """

    train: list[Example]
    calibration: list[Example]
    pairs: list[Example]
    hard_benign: list[Example]
    apart: Mapping[str, list[Example]]


def build_dataset(recipe: Recipe, context: SourceContext) -> Dataset:
    """Load, drop, de-duplicate, split and match; the same rows each time.

    Development rows come first in the de-duplication, and their groups are left out elsewhere: what is measured on is
    never trained or calibrated on. A row may be measured on in several sets.

    Raises:
        DatasetError: too few rows of a label are left.
    """
    seen: set[str] = set()

    def rows_of(sources: Iterable[Source], labels: set[int]) -> list[Example]:
        loaded = [example for source in sources for example in source.load(context) if example.label in labels]
        return without_duplicates(without_dropped(loaded), seen=seen)

    pairs = rows_of(recipe.development.pairs, {0, 1})
    hard_benign = rows_of(recipe.development.hard_benign, {0})
    apart = {name: _own_rows(sources, context, seen) for name, sources in recipe.development.apart.items()}
    measured = {example.group for rows in (pairs, hard_benign, *apart.values()) for example in rows}
    own_benign, positives, negatives = (
        _without_groups(rows_of(sources, {label}), measured)[0]
        for sources, label in (
            (recipe.calibration.benign, 0),
            (recipe.training.positives, 1),
            (recipe.training.negatives, 0),
        )
    )
    kept, held = hold_out(negatives, recipe.calibration.held_out, salt=str(recipe.seed))
    positives, unseen = _without_groups(positives, {example.group for example in held})
    if unseen:
        groups = {example.group for example in unseen}
        apart[_UNSEEN_GROUPS] = [*unseen, *(example for example in held if example.group in groups)]
    rng = context.rng("training rows")
    share = recipe.training.vary_form
    positives = vary_form(positives, share, rng)
    varied = vary_form(kept, share, rng)
    talk = context.rng("small talk")
    messages = [
        example.text
        for example in without_dropped(e for source in recipe.training.small_talk_of for e in source.load(context))
        if example.group not in measured
    ]
    positives, varied, own_benign, held = (
        add_small_talk(rows, recipe.training.small_talk, talk, messages=messages)
        for rows in (positives, varied, own_benign, held)
    )
    negatives = match_negatives(positives, varied, recipe.training.negatives_per_positive, rng)
    if recipe.training.match_positives:
        positives = match_negatives(negatives, positives, 1.0, rng)
    taken = {id(example) for example in negatives}
    rest = [example for example in varied if id(example) not in taken]
    negatives += rng.sample(rest, min(len(rest), round(recipe.training.general_negatives * len(positives))))
    calibration = [*own_benign, *held]
    if len(calibration) > recipe.calibration.max_rows:
        calibration = context.rng("calibration rows").sample(calibration, recipe.calibration.max_rows)
    for label, rows in (("positive", positives), ("negative", negatives)):
        if len(rows) < _MIN_PER_CLASS:
            raise DatasetError(
                f"recipe {recipe.name!r}: {len(rows)} {label} training rows are left after the drop list, duplicates "
                f"and matching; at least {_MIN_PER_CLASS} are needed. Add sets, or negatives in the positives' form "
                "and length."
            )
    if not calibration:
        raise DatasetError(
            f"recipe {recipe.name!r}: no benign rows are left for calibration. Raise 'calibration.held_out' or add a "
            "'calibration.benign' set."
        )
    return Dataset(
        train=[*positives, *negatives], calibration=calibration, pairs=pairs, hard_benign=hard_benign, apart=apart
    )


def _own_rows(sources: Iterable[Source], context: SourceContext, seen: set[str]) -> list[Example]:
    """A set that is measured on by itself, complete whatever stands in the others."""
    own: set[str] = set()
    rows = without_duplicates(without_dropped(e for source in sources for e in source.load(context)), seen=own)
    seen |= own
    return rows


def _without_groups(examples: Sequence[Example], groups: set[str]) -> tuple[list[Example], list[Example]]:
    """(those of other groups, those of these groups)."""
    return [e for e in examples if e.group not in groups], [e for e in examples if e.group in groups]


def count_sources(examples: Sequence[Example]) -> dict[str, int]:
    """How many rows each source gave."""
    return dict(sorted(Counter(example.source for example in examples).items()))
