"""Another aggregate, silent until it has seen a few scores."""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from probes.aggregate.base import Aggregator, Scores


def _parse(value: object) -> Aggregator:
    # The package finds this file by itself, so it can only be asked once it is there.
    from probes.aggregate import parse_aggregator

    return parse_aggregator(value)


def _config(aggregate: Aggregator) -> dict[str, Any]:
    return aggregate.config()


class After(Aggregator):
    """The aggregate ``of``, but nothing before ``tokens`` scores have been read.

    For streams: what has seen few scores is as loose as single ones, and the largest value on the way remembers it. An
    ``ema``, say, starts at the first score.
    """

    kind = "after"

    tokens: Annotated[int, Field(ge=2, le=100_000, description="scores that have to be there")]
    of: Annotated[
        Aggregator,
        PlainValidator(_parse),
        PlainSerializer(_config, return_type=dict[str, Any]),
        WithJsonSchema({"type": "object", "required": ["kind"]}),
        Field(description="another aggregate with its parameters, of those that go with any detector"),
    ]

    @model_validator(mode="after")
    def _goes_with_any_detector(self) -> Self:
        if self.of.channels > 1 or self.of.reads_before:
            raise ValueError(f"'of' is {self.of}, which goes with one kind of detector alone, as it is")
        return self

    @property
    def state_size(self) -> int:
        """How many scores there were, and the other's state."""
        return 1 + self.of.state_size

    @property
    def initial(self) -> float:
        """As the other begins; a count that is not a number of scores marks a sequence that has not begun."""
        return self.of.initial

    def __str__(self) -> str:
        return f"{self.kind}({self.tokens},{self.of})"

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        begun = np.where(state[:, 0] >= 1, state[:, 0], 0.0)
        running = self.of.update(state[:, 1:], values)
        count = begun + np.arange(1, len(values) + 1, dtype=np.float64)[:, None, None]
        state[:, 0] = count[-1]
        return np.where(count >= self.tokens, running, -np.inf)
