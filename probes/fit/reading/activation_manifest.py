"""What a folder of collected activations says about itself. Plain data; loads neither torch nor numpy."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probes.card import Digest, Format, ModelRef
from probes.errors import TelltaleError

__all__ = ["MANIFEST", "CollectSettings", "Manifest", "ShardRecord", "StoreError", "TokenPositions"]

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
"""Its name in the folder."""


class StoreError(TelltaleError, ValueError):
    """A folder of activations cannot be read, is damaged, or belongs to something else."""


class TokenPositions(StrEnum):
    """Which tokens of a request are kept. All tokens before the last of them are computed in any case."""

    LAST = "last"
    """The last token of the prompt, with the generation prompt."""
    TEMPLATE = "template"
    """The chat template's tokens behind the last message of the prompt."""
    RESPONSE = "response"
    """The reply."""
    PROMPT = "prompt"
    """The prompt."""
    ALL = "all"
    """The prompt and, where there is one, the reply."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CollectSettings(_Strict):
    """All that decides which numbers are collected: a run goes on only where these are the same."""

    model: ModelRef
    taps: tuple[str, ...] = Field(min_length=1)
    format: Format
    positions: TokenPositions
    input_digest: Digest = Field(description="SHA-256 of the file of prompts")
    input_requests: int = Field(gt=0, description="its lines")
    shard_bytes: int = Field(gt=0, description="of tensors in a shard, at most; a longer request has one of its own")
    shard_tokens: int = Field(gt=0, description="computed for a shard, at most; a longer request has one of its own")
    engine: dict[str, str | int | bool] = Field(description="what else decides how a batch is computed")
    created_by: str = Field(description="version that computed it")


class ShardRecord(_Strict):
    """One shard: a safetensors file and, beside it, a line of JSON for each of its requests."""

    name: str = Field(pattern=r"^shard-[0-9]{5,}$", description="of both files, without their endings")
    requests: int = Field(gt=0)
    rows: int = Field(gt=0, description="tokens that were kept")
    tokens: int = Field(gt=0, description="tokens that were computed")
    tensors_digest: Digest = Field(description="SHA-256 of the safetensors file")
    requests_digest: Digest = Field(description="SHA-256 of the JSON lines")
    sinks: int = Field(ge=0, description="leading positions whose norm is far above that of the others")


class Manifest(_Strict):
    """The folder's contents. While a run is under way it lists the shards that are complete."""

    format_version: Literal[1] = FORMAT_VERSION
    settings: CollectSettings
    roles: dict[str, int] = Field(description="role codes of the tokens, by the role's name; any other code: unknown")
    complete: bool = Field(description="whether every line of the input is in it")
    shards: tuple[ShardRecord, ...] = ()

    @property
    def requests(self) -> int:
        """Requests in all shards."""
        return sum(shard.requests for shard in self.shards)

    @property
    def rows(self) -> int:
        """Kept tokens in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Computed tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def skip_first(self) -> int:
        """How many leading positions are sinks, at any of the taps: kept, but no use to a detector."""
        return max((shard.sinks for shard in self.shards), default=0)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read ({error.strerror}). Name a folder that telltale collect wrote."
            ) from error
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise StoreError(
                f"{path}: field {where!r}: {first['msg']}. It was edited, damaged or written by another version: "
                "collect again into an empty folder."
            ) from error
