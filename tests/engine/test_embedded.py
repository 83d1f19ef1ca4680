"""The embedded model as `make serve` starts it, with its own pack and policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import probes.packs
from probes.artifact import Artifact
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from tests.engine.conftest import client_of
from tests.engine.test_serving import metric
from tests.support.server import Server, serving

pytestmark = pytest.mark.engine

QUESTION = "What is the capital of France?"
MODEL = DEFAULT_MODEL.partition(":")[2]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("embedded") / "serve.log"
    with serving([str(Path(sys.executable).parent / "telltale"), "serve"], log) as server:
        yield server


@pytest.mark.covers("chat", "every position accounted for")
@pytest.mark.covers("chat", "tokens unchanged")
def test_a_benign_chat_is_what_transformers_generates(embedded: Server) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    reply = client_of(embedded).chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
    folder = ensure_builtin_model(DEFAULT_MODEL, progress=lambda text: None).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = network.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    choice: Any = reply.choices[0]
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert choice.telltale["action"] == "allow"
    items = {item["name"]: item for item in choice.telltale["detectors"]}
    item = items["harmful_request"]
    assert item["scored"] + sum(item["skipped"].values()) == reply.usage.total_tokens  # type: ignore[union-attr]


def test_raw_text_is_judged_by_its_own_threshold(embedded: Server) -> None:
    reply: Any = client_of(embedded).completions.create(model=MODEL, prompt=QUESTION, max_tokens=4, temperature=0)
    assert reply.choices[0].telltale["action"] == "allow"
    values = {
        form: metric(embedded, "telltale_detector_threshold", detector="harmful_request", format=form)
        for form in ("chat", "raw")
    }
    folder = Path(probes.packs.__file__).parent / MODEL
    card = Artifact.load(folder / "harmful_request.safetensors").card
    assert values == {item.format.value: pytest.approx(item.threshold) for item in card.calibrations}
