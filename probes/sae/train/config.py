"""The file that ``telltale sae train`` takes: everything that decides what a trained autoencoder will be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from probes.errors import TelltaleError
from probes.sae.train.corpus import CorpusSettings
from probes.sae.train.settings import TrainingSettings
from probes.taps import Tap

__all__ = ["SaeConfig", "SaeConfigError", "read_config"]


class SaeConfigError(TelltaleError, ValueError):
    """The file cannot be read; the text says which field, what is allowed and what to do."""


class SaeConfig(BaseModel):
    """One sparse autoencoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal["1"]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    description: Annotated[str, Field(min_length=1)]
    licence: Annotated[str, Field(min_length=1, description="of the weights that come out")]
    seed: Annotated[int, Field(ge=0, description="of the split of the texts and of their order")] = 0
    tap: Annotated[str, Field(description="what is read, e.g. resid_post.15")]
    corpus: Annotated[CorpusSettings | None, Field(description="sets of texts")] = None
    collected: Annotated[
        Path | None, Field(description="in the place of 'corpus': a folder of telltale collect with all positions")
    ] = None
    training: TrainingSettings

    @field_validator("tap")
    @classmethod
    def _a_tap(cls, tap: str) -> str:
        Tap.parse(tap)
        return tap

    @model_validator(mode="after")
    def _one_origin_of_rows(self) -> SaeConfig:
        if (self.corpus is None) == (self.collected is None):
            raise ValueError("give either 'corpus' or 'collected'")
        return self


def read_config(path: Path) -> SaeConfig:
    """Read the file. A relative 'collected' begins at its folder.

    Raises:
        SaeConfigError: it cannot be read, is not YAML, has a duplicate or unknown key, or an impossible value.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaeConfigError(f"{path}: cannot be read ({error.strerror}). Name an existing file.") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SaeConfigError(f"{path}:{line}: {error.problem}. Each key may stand once; correct this line.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise SaeConfigError(f"{path}: not a YAML file in UTF-8 ({error}). Correct the file.") from error
    try:
        config = SaeConfig.model_validate(content)
    except ValidationError as error:
        raise SaeConfigError(f"{path}: {_explain(error)}") from error
    except TelltaleError as error:
        raise SaeConfigError(f"{path}: {error}") from error
    if config.collected is None:
        return config
    return config.model_copy(update={"collected": path.parent / config.collected})


def _explain(error: ValidationError) -> str:
    # A misspelt key is also a missing one: the misspelling says more.
    first = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-")) or "the file"
    hint = (
        "There is no such key; remove or correct it." if first["type"] == "extra_forbidden" else "Correct this field."
    )
    return f"{where}: {first['msg']}. {hint}"
