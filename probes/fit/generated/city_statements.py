"""True and false statements on where cities lie, half of either negated, from pairs of a city and its country."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CityStatement", "state_cities"]

# (affirmed, negated)
_FORMS = (
    ("The city of {city} is in {country}.", "The city of {city} is not in {country}."),
    ("{city} is a city in {country}.", "{city} is not a city in {country}."),
    ("{city} lies in {country}.", "{city} does not lie in {country}."),
    ("The country in which {city} lies is {country}.", "The country in which {city} lies is not {country}."),
)


@dataclass(frozen=True, slots=True)
class CityStatement:
    """One statement.

    Attributes:
        text: the statement.
        true: whether it is so.
        negated: whether it says "not".
        city: what it is about.
    """

    text: str
    true: bool
    negated: bool
    city: str


def state_cities(places: Sequence[tuple[str, str]], rng: random.Random) -> list[CityStatement]:
    """Four statements for each city: affirmed and negated, each once with its country and once with a wrong one.

    So neither the word "not" nor the country says anything about truth: wrong countries are those of the other cities,
    each as often as it is right.

    Args:
        places: (city, its country), several countries among them.
        rng: draws the wrong countries and the form of a city's four statements.
    """
    wrong = _others([country for _, country in places], rng)
    statements = []
    for (city, country), other in zip(places, wrong, strict=True):
        affirmed, negated = rng.choice(_FORMS)
        for named, right in ((country, True), (other, False)):
            statements.append(CityStatement(affirmed.format(city=city, country=named), right, False, city))
            statements.append(CityStatement(negated.format(city=city, country=named), not right, True, city))
    return statements


def _others(countries: Sequence[str], rng: random.Random) -> list[str]:
    """The same countries in another order, none (if that can be) in its own place."""
    drawn = list(countries)
    rng.shuffle(drawn)
    for place, country in enumerate(countries):
        if drawn[place] == country:
            swaps = [i for i, other in enumerate(drawn) if other != country and countries[i] != country]
            if swaps:
                chosen = rng.choice(swaps)
                drawn[place], drawn[chosen] = drawn[chosen], drawn[place]
    return drawn
