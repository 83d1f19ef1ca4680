"""The same statement behind instructions to be truthful and to deceive: the label is the instruction, not the words."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from probes.fit.generated.city_statements import CityStatement, state_cities
from probes.fit.generated.instructions import NEUTRAL, TRAINED, UNSEEN, Wording
from probes.fit.rows.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext
from probes.fit.sources.city_statements import large_cities


class Instruction(StrEnum):
    """What stands before the question."""

    TRAINED = "trained"
    """Wordings for training."""
    UNSEEN = "unseen"
    """Other wordings, never trained on: does it know the instruction, or its words?"""
    REMOVED = "removed"
    """None that says anything about truth; the label is whether the statement is false: does it know deceit at all?"""


class InstructedStatements(Source):
    """A question on a city, a system message with the instruction, and a statement as the reply.

    Behind either instruction stand the same questions and the same replies, true and false alike: the replies say
    nothing about the label (but where the instruction is removed). A wording is a group, a city where there is none.
    """

    kind = "instructed_statements"

    instruction: Annotated[Instruction, Field(strict=False, description="trained, unseen or removed")] = (
        Instruction.TRAINED
    )
    cities: Annotated[int, Field(ge=1, le=300, description="how many of the largest")] = 100

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        rng = context.rng(f"{self.kind}/{self.instruction.value}")
        places = large_cities(context.wheels, 1_000_000)[: self.cities]
        affirmed = [statement for statement in state_cities(places, rng) if not statement.negated]
        if self.instruction is Instruction.REMOVED:
            return [
                self._example(rng.choice(NEUTRAL), statement, int(not statement.true), group=statement.city)
                for statement in affirmed
            ]
        wordings: tuple[Wording, ...] = TRAINED if self.instruction is Instruction.TRAINED else UNSEEN
        examples = []
        for number, statement in enumerate(affirmed):
            # Two statements of a city follow each other: both get the same wording.
            wording = wordings[number // 2 % len(wordings)]
            group = text_digest(wording[0])[:12]
            examples += [self._example(text, statement, label, group=group) for label, text in enumerate(wording)]
        return examples

    def _example(self, instruction: str, statement: CityStatement, label: int, *, group: str) -> Example:
        question = f"In which country is {statement.city}?"
        return Example(
            text=question,
            label=label,
            source=f"{self.kind}_{self.instruction.value}",
            group=f"{self.kind}/{group}",
            turns=(("system", instruction), ("user", question)),
            response=statement.text,
        )
