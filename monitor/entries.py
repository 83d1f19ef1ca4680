"""What a policy file reads and writes with: its detectors and its steers. Data, checked for itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from monitor.alert_entry import AlertEntry
from monitor.strict import DetectorName, Name, Strict
from monitor.when import Above
from probes.aggregate import AnyAggregator
from probes.errors import did_you_mean
from probes.sae.combine import Combine
from probes.steering import Operator, SteerError, operator_kinds, parse_operator
from probes.steering.artifact import Safety
from probes.steering.steer import Positions

Latent = Annotated[int, Field(ge=0, description="number of a latent, from 0")]


_OF_LATENTS = ("kind", "latents", "combine", "weights", "intercept", "aggregate", "threshold")


class DetectorEntry(Strict):
    """What is read: a pack of detectors, one artifact, or latents of a sparse autoencoder."""

    pack: str | None = Field(default=None, description="a shipped pack, e.g. builtin:smollm2-135m-instruct")
    artifact: str | None = Field(
        default=None, description="path of a .safetensors file that telltale train wrote; relative to the policy file"
    )
    name: DetectorName | None = Field(
        default=None, description="what to call it here; an artifact's own name if left out, latents need one"
    )
    sae: str | None = Field(
        default=None,
        description="path of a sparse autoencoder (telltale sae import), relative to the policy file; or one that "
        "ships, builtin:PACK/NAME",
    )
    kind: Literal["sae_latent"] | None = Field(default=None, description="of what is read of a 'sae'")
    latents: tuple[Latent, ...] | None = Field(default=None, min_length=1, description="which latents of the 'sae'")
    combine: Combine | None = Field(
        default=None, description="what is made of a token's codes: max, sum, weighted, or single, for one latent"
    )
    weights: tuple[float, ...] | None = Field(default=None, description="one for each latent, with combine: weighted")
    intercept: float = Field(default=0.0, allow_inf_nan=False, description="added, with combine: weighted")
    aggregate: AnyAggregator | None = Field(
        default=None, description="of rules that name none, for latents; max if left out"
    )
    threshold: Above | None = Field(default=None, description="of rules that state none, for latents")
    alert: AlertEntry | None = Field(
        default=None, description="whom requests above a threshold of it wake; of a pack: for each of its detectors"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [key for key in ("pack", "artifact", "sae") if getattr(self, key) is not None]
        if len(sources) != 1:
            raise ValueError("an entry has exactly one of 'pack' and 'artifact', or 'sae'")
        if self.pack is not None and self.name is not None:
            raise ValueError("'name' renames one artifact; a pack's detectors keep their names")
        if self.sae is None:
            if strays := sorted(key for key in _OF_LATENTS if key in self.model_fields_set):
                raise ValueError(f"{strays[0]!r} belongs to latents of a 'sae'; {sources[0]!r} says it itself")
            return self
        for key in ("kind", "name", "latents"):
            if getattr(self, key) is None:
                raise ValueError(f"latents of a 'sae' need {key!r}: {{name: ..., kind: sae_latent, latents: [1742]}}")
        return self._fitting_latents()

    def _fitting_latents(self) -> Self:
        latents = self.latents or ()
        if doubles := sorted({latent for latent in latents if latents.count(latent) > 1}):
            raise ValueError(f"'latents' names {doubles[0]} twice; name each once")
        if self.combine is None and len(latents) > 1:
            raise ValueError("'latents' names several: say what is made of their codes, e.g. combine: max")
        if self.combine is Combine.SINGLE and len(latents) > 1:
            raise ValueError(f"'combine' is 'single', and 'latents' names {len(latents)}; say max, sum or weighted")
        weighted = self.combine is Combine.WEIGHTED
        if weighted != (self.weights is not None) or (weighted and len(self.weights or ()) != len(latents)):
            raise ValueError("'weights' has one number for each latent, with combine: weighted and no other")
        if self.intercept and not weighted:
            raise ValueError("'intercept' is added to a weighted sum: combine: weighted")
        return self

    @property
    def combined(self) -> Combine:
        """What is made of the codes of a token."""
        return self.combine or Combine.SINGLE


def _operators_in_schema(schema: dict[str, Any]) -> None:
    """Every operator, with its parameters beside the entry's own keys."""
    own = schema["properties"]
    variants = []
    for kind, cls in operator_kinds().items():
        parameters = cls.model_json_schema()
        variants.append(
            {
                "additionalProperties": False,
                "properties": {
                    **dict.fromkeys(own, True),
                    **parameters.get("properties", {}),
                    "op": {"const": kind, "description": parameters.get("description", "")},
                },
                "required": parameters.get("required", []),
            }
        )
    schema.pop("additionalProperties", None)
    schema["oneOf"] = variants


class SteerEntry(BaseModel):
    """What may be written: a direction or a latent, an operator with its parameters, and the rows.

    The operator's parameters stand beside the other keys: ``{name: calm, artifact: ..., op: cap, strength: 0.5}``.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, json_schema_extra=_operators_in_schema)

    name: Name
    artifact: str | None = Field(
        default=None, description="path of a direction, a .safetensors file with a card; relative to the policy file"
    )
    sae: str | None = Field(
        default=None, description="a sparse autoencoder, in the place of a direction: path, or builtin:PACK/NAME"
    )
    latent: Latent | None = Field(default=None, description="which latent of the 'sae'")
    more_is: Safety | None = Field(
        default=None, description="what more of the latent does to the model's safety; a direction's card says it"
    )
    op: str = Field(description="the operator: cap, add, ablate, ...")
    positions: Positions = Field(default=Positions.GENERATED, description="which rows: generated, prompt or all")
    max_dose: float = Field(
        default=0.5, gt=0, le=10, allow_inf_nan=False, description="largest change of a row, in median norms"
    )
    allow_safety_reducing: bool = Field(default=False, description="whether it may make the model less safe")

    @model_validator(mode="after")
    def _valid_operator(self) -> Self:
        if (self.artifact is None) == (self.sae is None):
            raise ValueError("a steer has exactly one of 'artifact' and 'sae'")
        if (self.sae is None) != (self.latent is None):
            raise ValueError("'sae' and 'latent' stand together: {sae: FILE, latent: 1742, op: set_latent, target: 0}")
        if self.sae is None and self.more_is is not None:
            raise ValueError("'more_is' is said of a latent; a direction's card says it")
        if (self.sae is not None) != self.operator().of_latent:
            known = [kind for kind, cls in operator_kinds().items() if cls.of_latent == (self.sae is not None)]
            what = "along a direction" if self.sae is None else "to a latent"
            raise ValueError(f"'op' is {self.op!r}, which does not write {what}. Known: {', '.join(known)}")
        return self

    def operator(self) -> Operator:
        """The operator with its parameters.

        Raises:
            ValueError: there is no such operator, or no such parameter, or one is out of range.
        """
        given = self.model_extra or {}
        try:
            return parse_operator(self.op, given)
        except SteerError as error:
            raise ValueError(f"'op': {error}") from error
        except ValidationError as error:
            known = {*SteerEntry.model_fields, *operator_kinds()[self.op].model_fields}
            raise ValueError("; ".join(_of_operator(self.op, item, known) for item in error.errors())) from error


def _of_operator(op: str, item: Any, known: set[str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key!r} is not a key of a steer with op: {op}. {did_you_mean(key, known)}"
    return f"{key!r}: {item['msg']} (op: {op})"
