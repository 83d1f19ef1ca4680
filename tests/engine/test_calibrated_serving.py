"""What cards say beside one threshold, on a real server: thresholds by length, probabilities, whose text is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.aggregate.delta import Delta
from probes.artifact import Artifact, save_artifact, write_card
from probes.card import Calibration, Card, Format, LengthBucket, Platt, Stage
from probes.detectors import load_detector
from probes.fit.reading.scores import open_reader, score_requests, statistics_of_requests
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.speaker import Speaker
from tests.engine.conftest import client_of
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import D_MODEL, MARK, TinyModel, save_trigger

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EDGES = (24, 48)
LIMITS = (MARK / 2, MARK + 1, MARK / 4)
"""For prompts of up to 24 tokens, up to 48, and longer ones: the planted token fires, does not, and fires."""
PLATT = Platt(
    slope=0.5, intercept=-3.0, num_positive=50, num_negative=50, ece_before=0.2, ece_after=0.02, data_digest="0" * 64
)
POLICY = """\
version: "1"
detectors:
  - artifact: trigger.safetensors
  - artifact: off_task.safetensors
policies:
  - name: default
    on_gap: block
    on_uncalibrated: allow
    expose: scores
    quantise: 0
    rules:
      - {name: at-prompt, when: {detector: trigger, stage: prompt}, do: {action: block}, mode: enforce}
      - {name: at-end, when: {detector: trigger, stage: response}, do: {action: flag}, mode: enforce}
      - {name: drifts, when: {detector: off_task, stage: prompt}, do: {action: flag}, mode: enforce}
"""


def bucketed(found: Calibration) -> Calibration:
    """Thresholds by length at the prompt; at the end of a reply of up to 3 tokens the planted token is let through."""
    edges, limits = (EDGES, LIMITS) if found.stage is Stage.PROMPT else ((3,), (MARK + 1, MARK / 2))
    buckets = tuple(
        LengthBucket(max_tokens=end, threshold=limit, num_benign=400, certified=True, top_scores=(limit + 1, limit))
        for end, limit in zip([*edges, None], limits, strict=True)
    )
    platt = PLATT if found.format is Format.RAW else None
    return found.model_copy(update={"buckets": buckets, "platt": platt})


def save_drift(path: Path, model: Path) -> Artifact:
    """A direction drawn by lot, for the texts of tools."""
    calibration = Calibration(
        stage=Stage.PROMPT, format=Format.CHAT, aggregate=Delta(of="last"), threshold=0.0, target_fpr=0.05,
        num_benign=100, top_scores=(1.0, 0.0), data_digest="0" * 64, certified=True,
    )  # fmt: skip
    card = Card(
        name="off_task", kind="drift", description="by a test", taps=("resid_post.1",), formats=(Format.CHAT,),
        model=read_model_ref(model, model_id=model.name, dtype="float32"), skip_first=1, tensors_digest="0" * 64,
        segments=(Speaker.TOOL,), calibrations=(calibration,),
    )  # fmt: skip
    direction = np.random.default_rng(6).standard_normal(D_MODEL).astype(np.float32)
    return save_artifact(path, card, {"direction": direction, "scale": np.full(D_MODEL, 500.0, dtype=np.float32)})


@pytest.fixture(scope="module")
def server(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("calibrated")
    trigger = save_trigger(folder / "trigger.safetensors", tiny.path, stages=(Stage.PROMPT, Stage.RESPONSE))
    calibrations = tuple(bucketed(found) for found in trigger.card.calibrations)
    write_card(trigger.path, trigger.card.model_copy(update={"calibrations": calibrations}))
    save_drift(folder / "off_task.safetensors", tiny.path)
    (folder / "telltale.yaml").write_text(POLICY)
    command = telltale_command(tiny.path, folder / "telltale.yaml", "--max-num-batched-tokens", "40")
    with serving(command, folder / "server.log") as running:
        yield running


def complete(server: Server, tokens: Sequence[int], count: int = 1) -> Any:
    """The only choice of a raw prompt of exactly these tokens."""
    made: Any = client_of(server).completions.create(
        model="tiny", prompt=list(tokens), max_tokens=count, temperature=0.0, extra_body={"ignore_eos": True}
    )
    return made.choices[0]


def told(choice: Any, name: str, stage: str) -> dict[str, Any]:
    (found,) = (item for item in choice.telltale["detectors"] if (item["name"], item["stage"]) == (name, stage))
    return dict(found)


# One token is the sink, which is not read and does not count.
@pytest.mark.parametrize(
    ("length", "fires"), [(10, True), (25, True), (26, False), (49, False), (50, True), (150, True)]
)
@pytest.mark.parametrize("place", [1, -1])
def test_a_prompt_is_judged_by_the_limit_of_its_length(
    server: Server, tiny: TinyModel, length: int, fires: bool, place: int
) -> None:
    tokens = np.random.default_rng(length).integers(1000, 4000, size=length).tolist()
    tokens[place] = tiny.trigger
    choice = complete(server, tokens)
    found = told(choice, "trigger", "prompt")
    assert found["score"] == pytest.approx(MARK, abs=1e-3)
    assert found["fired"] is fires
    assert (choice.telltale["action"] == "block") is fires
    assert [part["threshold"] for part in found["thresholds_by_length"]] == list(LIMITS)
    harmless = complete(server, [token if token != tiny.trigger else 900 for token in tokens])
    assert told(harmless, "trigger", "prompt")["fired"] is False


def test_a_reply_is_judged_at_its_end_by_its_own_length(server: Server, tiny: TinyModel) -> None:
    """Of a raw prompt everything is read. The last token that is sampled is never fed back, so nobody reads it."""
    for count, fires in ((1, False), (2, False), (4, True)):
        tokens = [900, tiny.trigger, *([901] * count)]
        found = told(complete(server, tokens[: 1 + count]), "trigger", "response")
        assert found["fired"] is fires, count


def test_the_probability_stands_beside_the_score_of_its_format(server: Server, tiny: TinyModel) -> None:
    found = told(complete(server, [900, tiny.trigger, 901]), "trigger", "prompt")
    assert found["probability"] == pytest.approx(1 / (1 + math.exp(-(0.5 * found["score"] - 3.0))), abs=1e-4)
    reply: Any = client_of(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi there"}], max_tokens=2
    )
    found = told(reply.choices[0], "trigger", "prompt")
    assert found["score"] is not None
    assert "probability" not in found


def test_a_drift_detector_reads_what_tools_say(server: Server, tiny: TinyModel) -> None:
    """The served statistic is the offline one, over the same tokens, whatever the prefill chunks."""
    rng = np.random.default_rng(3)
    words = ["river", "stone", "lantern", "harvest", "copper", "meadow", "winter", "signal"]
    say = [" ".join(rng.choice(words, int(rng.integers(1, 60)))) for _ in range(24)]
    turns = [
        (("user", say[0]), ("tool", say[1])),
        (("user", say[2]), ("tool", say[3]), ("user", say[4])),
        *(
            (("system", say[i]), ("user", say[i + 1]), ("tool", say[i + 2]), ("tool", say[i + 3]))
            for i in range(5, 20, 4)
        ),
    ]
    examples = [Example(text=each[-1][1], label=0, source="s", group="g", turns=each) for each in turns]
    artifact = Artifact.load(server.log.parent / "off_task.safetensors")
    reader = open_reader(
        [artifact], tiny.path, model=artifact.card.model, cache_dir=server.log.parent, progress=lambda _: None
    )
    rendered = reader.render(examples, text_format=Format.CHAT, stage=Stage.PROMPT, segments=artifact.card.segments)
    (scores,) = score_requests([load_detector(artifact)], rendered, reader, skip_first=[1], label="x")
    offline = statistics_of_requests(Delta(of="last"), Stage.PROMPT, scores)
    served = []
    for example, statistic in zip(examples, offline, strict=True):
        messages: Any = example.messages
        reply: Any = client_of(server).chat.completions.create(model="tiny", messages=messages, max_tokens=2)
        found = told(reply.choices[0], "off_task", "prompt")
        assert found["segments"] == ["tool"]
        assert found["fired"] == (statistic > 0.0)
        served.append(found["score"])
    assert np.abs(np.array(served) - offline).max() <= 1e-3 * max(1.0, float(offline.std()))
    assert offline.std() > 1e-2
    nothing: Any = client_of(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert told(nothing.choices[0], "off_task", "prompt")["score"] is None
