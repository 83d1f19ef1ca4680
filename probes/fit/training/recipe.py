"""A recipe: everything that decides what a trained detector will be, in one strict YAML file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from probes.aggregate import AnyAggregator
from probes.card import Format, Stage
from probes.errors import TelltaleError, did_you_mean
from probes.fit.fitters import AnyFitter
from probes.fit.sources import AnySource, source_kinds
from probes.fit.token_fitters import AnyTokenFitter
from probes.taps import Site

__all__ = [
    "Buckets",
    "Calibrate",
    "Development",
    "LeaveOut",
    "Recipe",
    "RecipeError",
    "Search",
    "Training",
    "read_recipe",
]


class RecipeError(TelltaleError, ValueError):
    """A recipe cannot be read; the text says which field, what is allowed and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Training(_Strict):
    """The rows that the probe is fitted on."""

    positives: Annotated[tuple[AnySource, ...], Field(min_length=1, description="sets; rows with label 1 are taken")]
    negatives: Annotated[tuple[AnySource, ...], Field(min_length=1, description="sets; rows with label 0 are taken")]
    negatives_per_positive: Annotated[
        float, Field(gt=0, le=20, description="negatives of the same form and length for each positive, at most")
    ] = 2.0
    general_negatives: Annotated[
        float, Field(ge=0, le=20, description="further negatives per positive, drawn whatever their form and length")
    ] = 0.5
    match_positives: Annotated[
        bool, Field(description="leave out positives for which there is no negative of their form and length")
    ] = False
    vary_form: Annotated[float, Field(ge=0, le=1, description="share of rows whose surface is rewritten")] = 0.4
    small_talk: Annotated[
        float, Field(ge=0, le=1, description="share of rows that get friendly words before or behind them")
    ] = 0.0
    small_talk_of: Annotated[
        tuple[AnySource, ...],
        Field(description="sets of harmless messages that stand in the place of friendly words in some of these rows"),
    ] = ()
    formats: Annotated[tuple[Format, ...], Field(min_length=1, description="how the rows are presented")] = (
        Format.CHAT,
    )


class LeaveOut(StrEnum):
    """What the folds of the search hold out in turn."""

    GROUP = "group"
    """A group of positives, or a fifth of the groups where they are many; negatives by their groups."""
    SOURCE = "source"
    """A whole set, with its positives and its negatives."""


class Search(_Strict):
    """What is tried; the best mean AUROC over the folds wins."""

    site: Site = Site.RESID_POST
    layers: Annotated[tuple[int, ...], Field(min_length=1, description="0 = after the first decoder layer")]
    aggregates: Annotated[
        tuple[AnyAggregator, ...],
        Field(min_length=1, description="linear ones, whose means of the activations are fitted on"),
    ]
    serve: Annotated[
        tuple[AnyAggregator, ...],
        Field(
            description="any aggregates, tried on the token scores of the fitted probe; none: the one it was fitted on"
        ),
    ] = ()
    fitters: Annotated[
        tuple[AnyFitter, ...],
        Field(min_length=1, description="how the direction is found, those that are preferred among equals first"),
    ]
    ensembles: Annotated[
        tuple[Annotated[int, Field(ge=2, le=64)], ...],
        Field(description="how many of the best layers are averaged, tried after single ones; none: one layer"),
    ] = ()
    token_fitters: Annotated[
        tuple[AnyTokenFitter, ...],
        Field(description="probes over all tokens, tried at the best layer after linear ones; they need memory"),
    ] = ()
    leave_out: LeaveOut = LeaveOut.GROUP


class Buckets(StrEnum):
    """Whether there are thresholds by length."""

    OFF = "off"
    """One threshold for all lengths."""
    AUTO = "auto"
    """Where the statistic grows with the length, and the rows suffice for several."""


class Calibrate(_Strict):
    """The benign requests that the threshold rests on: never trained on."""

    held_out: Annotated[float, Field(ge=0, lt=1, description="share of the negatives' groups that is held out")] = 0.4
    benign: Annotated[tuple[AnySource, ...], Field(description="further sets; rows with label 0 are taken")] = ()
    max_rows: Annotated[int, Field(ge=1)] = 2000
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] = (Format.CHAT,)
    target_fpr: Annotated[float, Field(gt=0, lt=1, description="share of benign requests that may fire")] = 0.01
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    # Not written where it is not asked for, so that the cards of recipes without it stay as they are.
    buckets: Annotated[
        Buckets,
        Field(description="thresholds by length: off or auto", exclude_if=lambda chosen: chosen is Buckets.OFF),
    ] = Buckets.OFF


class Development(_Strict):
    """Sets of other sources that the finished detector is measured on, once."""

    pairs: Annotated[tuple[AnySource, ...], Field(description="sets with both labels")] = ()
    hard_benign: Annotated[tuple[AnySource, ...], Field(description="harmless rows that look harmful")] = ()
    apart: Annotated[
        dict[str, Annotated[tuple[AnySource, ...], Field(min_length=1)]],
        Field(description="further sets, by name, each reported by itself; of one label alone: how many rows fire"),
    ] = Field(default_factory=dict)
    length_tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Recipe(_Strict):
    """One detector."""

    version: Literal["1"]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    description: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    stage: Annotated[Stage, Field(description="when it is judged; stream and response need rows with responses")] = (
        Stage.PROMPT
    )
    training: Training
    search: Search
    calibration: Calibrate = Calibrate()
    development: Development = Development()

    @model_validator(mode="after")
    def _ends_where_tokens_are_fitted(self) -> Recipe:
        if self.search.token_fitters and self.stage is Stage.STREAM:
            raise ValueError(
                "'search.token_fitters' are fitted on whole requests, the stage 'stream' judges them at every token: "
                "leave them out, or say stage: response"
            )
        return self

    @model_validator(mode="after")
    def _has_benign_rows(self) -> Recipe:
        if self.calibration.held_out == 0 and not self.calibration.benign:
            raise ValueError("calibration needs 'held_out' above 0 or a 'benign' set: a threshold rests on benign rows")
        return self


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: the file cannot be read, is not YAML, has a duplicate or unknown key, or an impossible value.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            content = YAML(typ="rt", pure=True).load(stream)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Name an existing recipe file.") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: {error.problem}. Each key may stand once; correct this line.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML file in UTF-8 ({error}). Correct the file.") from error
    try:
        return Recipe.model_validate(_plain(content))
    except ValidationError as error:
        raise RecipeError(_explain(path, content, error)) from error
    except TelltaleError as error:
        raise RecipeError(f"{path}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _explain(path: Path, content: Any, error: ValidationError) -> str:
    # A misspelt key is also a missing one: the misspelling says more.
    found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")[0]
    place = [part for part in found["loc"] if not isinstance(part, str) or not part.startswith("function-")]
    where = ".".join(str(part) for part in place) or "the file"
    hint = "Correct this field."
    if found["type"] == "extra_forbidden":
        hint = did_you_mean(str(place[-1]), _fields_at(content, place[:-1]))
    return f"{path}:{_line_of(content, place)}: {where}: {found['msg']}. {hint}"


def _fields_at(content: Any, place: list[int | str]) -> list[str]:
    """The keys that are allowed in the mapping at ``place``."""
    model: Any = Recipe
    for part in place:
        content = content[part]
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    if isinstance(content, dict) and content.get("kind") in source_kinds():
        model = source_kinds()[content["kind"]]
    return list(model.model_fields)


def _line_of(content: Any, place: list[int | str]) -> int:
    line = 1
    for part in place:
        marks = getattr(getattr(content, "lc", None), "data", None)
        if not marks or part not in marks:
            break
        line = marks[part][0] + 1
        content = content[part]
    return line
