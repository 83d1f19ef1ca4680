"""A build as the serving engine computes it: a folder that ``telltale collect`` wrote of the very rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.artifact import sha256_file
from probes.card import Format, ModelRef, Stage
from probes.fit.reading.activation_manifest import TokenPositions
from probes.fit.reading.activation_store import ActivationStore
from probes.fit.reading.rendered import Rendered
from probes.fit.rows.example import Example
from probes.fit.staleness.rows import StalenessError
from probes.speaker import Speaker
from probes.taps import Tap

__all__ = ["CollectedBuild"]


class CollectedBuild:
    """Activations of a file of rows, in its order. It is a ``BuildReader``.

    Args:
        folder: that was collected with all positions, or at the stage ``prompt`` with those of the prompt.
        data: the file of rows.
    Raises:
        StalenessError: the folder was collected of another file.
        probes.fit.reading.activation_manifest.StoreError: it is damaged or not complete.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder = folder
        self._store = ActivationStore.open(folder)
        if self._store.manifest.settings.input_digest != sha256_file(data):
            raise StalenessError(
                f"{folder}: was collected of another file than {data}. Run telltale collect {data} --positions all on "
                "this build."
            )

    @property
    def model(self) -> ModelRef:
        """Which build it is, with the dtype that the engine computed in."""
        return self._store.manifest.settings.model

    @property
    def read_by(self) -> str:
        """What computed the activations."""
        settings = self._store.manifest.settings
        return f"{settings.created_by}, telltale collect, {settings.model.dtype}"

    def render(
        self, examples: Sequence[Example], *, text_format: Format, stage: Stage, segments: Collection[Speaker] = ()
    ) -> list[Rendered]:
        """The collected tokens of each row; see ``BuildReader.render``.

        Raises:
            StalenessError: another format, positions or number of rows was collected.
        """
        settings = self._store.manifest.settings
        needed = {TokenPositions.ALL, *([TokenPositions.PROMPT] if stage is Stage.PROMPT else [])}
        if settings.format is not text_format or settings.positions not in needed or len(self._store) != len(examples):
            raise StalenessError(
                f"{self._folder}: holds {len(self._store)} rows as {settings.format.value}, positions "
                f"{settings.positions.value}; {len(examples)} as {text_format.value}, positions all, are needed. "
                "Collect again."
            )
        return [self._rendered(number, text_format, stage, segments) for number in range(len(examples))]

    def sweep(
        self, requests: Sequence[Rendered], taps: Sequence[Tap], *, label: str
    ) -> Iterator[tuple[int, Mapping[Tap, npt.NDArray[np.float32]]]]:
        """The rows that ``render`` gave, all of them; see ``ActivationSource.sweep``.

        Raises:
            probes.fit.reading.activation_manifest.StoreError: a tap was not collected.
        """
        for number, (request, found) in enumerate(zip(requests, self._store, strict=True)):
            yield number, {tap: found.at(tap)[: len(request.tokens)] for tap in taps}

    def _rendered(self, number: int, text_format: Format, stage: Stage, segments: Collection[Speaker]) -> Rendered:
        found = self._store[number]
        tokens, prompt = tuple(found.tokens.tolist()), found.record.num_prompt
        if stage is Stage.PROMPT:
            if not segments:
                return Rendered(tokens[:prompt], 0)
            codes, roles = self._store.manifest.roles, found.roles[:prompt]
            if not np.isin(roles, list(codes.values())).all():  # unknown roles: a rule reads everything
                return Rendered(tokens[:prompt], 0)
            only = np.flatnonzero(np.isin(roles, [codes[speaker.value] for speaker in segments]))
            return Rendered(tokens[:prompt], 0, tuple(only.tolist()))
        if text_format is Format.CHAT and len(tokens) == prompt:
            raise StalenessError(
                f"{self._folder}: line {found.record.line} has no reply, which is what is read at the stage "
                f"{stage.value!r}. Give every row a 'response'."
            )
        return Rendered(tokens, prompt if text_format is Format.CHAT else 0)
