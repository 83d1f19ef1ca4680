"""The detection delay of a detector that judges replies while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from probes.card import Calibration, Format, Stage
from probes.fit.evaluation.delay import Delay, detection_delay, first_crossing
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.scores import RequestScores, running_statistic
from probes.fit.rows.example import Example

__all__ = ["stream_delay"]


def stream_delay(
    calibration: Calibration, examples: Sequence[Example], scores: Sequence[RequestScores], reader: ActivationReader
) -> Delay:
    """How many tokens of the positive replies pass before the running statistic lies above the threshold.

    It is counted from the token in which the marked onset lies, to within one where the onset cuts a token; from the
    first token that is read where nobody has marked one.

    Args:
        calibration: aggregate, threshold and format.
        examples: of both labels.
        scores: of their tokens.
        reader: of the model: its tokenizer says which token an onset is.
    """
    crossings, onsets = [], []
    for example, request in zip(examples, scores, strict=True):
        if not example.label:
            continue
        running = running_statistic(calibration.aggregate, request.scores, before=request.before)
        crossings.append(first_crossing(running, calibration.threshold))
        onsets.append(_onset(example, request, reader, calibration.format))
    return detection_delay(crossings, onsets)


def _onset(example: Example, request: RequestScores, reader: ActivationReader, text_format: Format) -> int:
    """Index, in the read sequence, of the token at which the reply becomes what its label says."""
    if example.onset is None:
        return 0
    stage = Stage.STREAM if example.onset else Stage.PROMPT
    before = replace(example, response=example.response[: example.onset])
    (rendered,) = reader.render([before], text_format=text_format, stage=stage)
    return max(0, len(rendered.tokens) - request.first)
