"""Steering in a real engine: what was asked for happens to whom it was asked for, and to nobody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import probes.steering
from monitor.policy import Plan
from probes.steering.steer import END, Steer
from serving.deployment import check_policy
from tests.engine.steering_runs import (
    BLOCK,
    FEW_BLOCKS,
    HEAD,
    NEW_TOKENS,
    TWO_CHOICES,
    Result,
    random_tokens,
    run_entries,
)
from tests.support.tiny import D_MODEL, PROMPT, TinyModel, save_direction
from tests.unit.test_steering import CLAMP

pytestmark = pytest.mark.engine

CLEAN, HOT, ENDS_IN_BLOCK = 0, 1, 2
"""Places in a batch: 300 tokens without the trigger, 300 with it, and 120 with it."""

PUSH = "  - {name: push, artifact: push.safetensors, op: add, strength: 0.5, positions: generated}"
CAP = "  - {name: trim, artifact: trim.safetensors, op: cap, positions: all, max_dose: 2}"
ABLATE = "  - {name: blank, artifact: blank.safetensors, op: ablate, strength: 0.8, positions: generated}"
IDLE = "  - {name: idle, artifact: idle.safetensors, op: cap, positions: all}"
CLAMPED = "  - {name: clamped, artifact: blank.safetensors, op: clamp, target: 3.0, positions: all, max_dose: 10}"
STEER = "{action: steer, steer: push, gate: latched}"
POLICIES = {
    "by_rule": HEAD.format(steers=PUSH, always="", stage="prompt", do=STEER, mode="enforce"),
    "shadow": HEAD.format(steers=PUSH, always="", stage="prompt", do=STEER, mode="shadow"),
    "stream": HEAD.format(steers=PUSH, always="", stage="stream", do=STEER, mode="enforce"),
    "always": HEAD.format(
        steers=f"{CAP}\n{ABLATE}", always="trim, blank", stage="prompt", do="{action: flag}", mode="shadow"
    ),
    "prompt_gate": HEAD.format(
        steers=PUSH.replace("generated", "all"), always="", stage="prompt", do=STEER, mode="enforce"
    ),
    "by_request": HEAD.format(
        steers="\n".join(line.replace("generated", "all") for line in (PUSH, ABLATE)),
        always="",
        stage="prompt",
        do="{action: flag}",
        mode="shadow",
    ).replace("steers: []", "on_request: [push, blank]"),
    "clamped": HEAD.format(steers=CLAMPED, always="clamped", stage="prompt", do="{action: flag}", mode="shadow"),
    "identity": HEAD.format(steers=IDLE, always="idle", stage="prompt", do="{action: flag}", mode="shadow"),
}

ASKED: Mapping[str, dict[str, Any]] = {"-": {}, "p": {"steer": "push"}, "b": {"steer": "blank"}}
ORDERS = ("-pb-", "bp-b")
"""One prompt, several times in a row: without a steer, with one, and with the other."""


@pytest.fixture(scope="module")
def batch(tiny: TinyModel) -> list[list[int]]:
    trigger = tiny.trigger
    return [
        random_tokens(1, 300, trigger=None, without=trigger),
        random_tokens(2, 300, trigger=trigger, without=trigger),
        random_tokens(3, 120, trigger=trigger, without=trigger),
    ]


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an operator that is not ours."""
    folder = tmp_path_factory.mktemp("operators")
    (folder / "clamp.py").write_text(CLAMP)
    return folder


@pytest.fixture(scope="module")
def plans(tiny: TinyModel, operators: Path) -> dict[str, Plan]:
    folder = tiny.path.parent
    generator = np.random.default_rng(11)
    for name, layer, ceiling in (("push", 0, 1.0), ("trim", 0, 1.0), ("blank", 1, 1.0), ("idle", 0, 1e6)):
        direction = generator.standard_normal(D_MODEL)
        direction[0] = 0  # what the detector reads
        save_direction(
            folder / f"{name}.safetensors",
            tiny.path,
            direction / np.linalg.norm(direction),
            layer=layer,
            ceiling=ceiling,
        )
    for name, text in POLICIES.items():
        (folder / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes.steering, "__path__", [*probes.steering.__path__, str(operators)])
        return {name: check_policy(folder / f"{name}.yaml") for name in POLICIES}


@pytest.fixture(scope="module")
def found(
    tiny: TinyModel,
    plans: dict[str, Plan],
    batch: list[list[int]],
    operators: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Result]:
    follow = {"follow": [0, ENDS_IN_BLOCK], "more": batch[CLEAN][:30]}
    trigger = tiny.trigger
    crowd = [random_tokens(20 + n, 120 + n, trigger=trigger, without=trigger) for n in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    message = {"role": "user", "content": PROMPT}
    chat = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    chat_tokens = list(tokenizer(chat, add_special_tokens=False)["input_ids"])
    entries: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
        "shadow": ("shadow", {}, [batch, batch, [follow], crowd, [chat_tokens]]),
        "by_rule": ("by_rule", {}, [batch, batch, [follow], crowd, [chat_tokens], [batch[HOT]]]),
        "chunked": ("by_rule", {"enable_prefix_caching": False, "max_num_batched_tokens": 64}, [batch, [follow]]),
        "preempted": ("by_rule", FEW_BLOCKS | {"max_num_batched_tokens": 512}, [crowd]),
        "stream": ("stream", {}, [[chat_tokens], [batch[CLEAN], chat_tokens]]),
        "always": ("always", {}, [batch, batch]),
        "prompt_gate": ("prompt_gate", {}, [batch, batch]),
        "clamped": ("clamped", {}, [batch]),
        **{f"order {order}": ("by_request", {}, [batch[:1]] * len(order)) for order in ORDERS},
        "together": ("by_request", {}, [batch[:1] * len(ASKED)]),
        "identity": ("identity", {}, [batch]),
        "broken": ("by_rule", {}, [batch]),
    }
    asked = {f"order {order}": [[ASKED[letter]] for letter in order] for order in ORDERS}
    asked["together"] = [list(ASKED.values())]
    return run_entries(tiny, entries, tmp_path_factory.mktemp("steered"), operators=operators, asked=asked)


def tokens_of(run: Sequence[Result]) -> list[list[int]]:
    return [result["tokens"] for result in run]


@pytest.mark.covers("steered requests", "isolation")
def test_in_one_batch_only_the_flagged_requests_are_steered(found: dict[str, Result]) -> None:
    for plain, steered in zip(found["shadow"]["runs"][0], found["by_rule"]["runs"][0], strict=True):
        assert plain["telltale"]["action"] == "allow"
        assert "steered" not in plain["telltale"]
        # The first token is sampled from the prompt's last row, which is computed before the rule can fire.
        assert steered["tokens"][0] == plain["tokens"][0]
        assert steered["logprobs"][0] == plain["logprobs"][0]
    plain, steered = (found[name]["runs"][0][CLEAN] for name in ("shadow", "by_rule"))
    assert steered["telltale"]["action"] == "allow"
    assert "steered" not in steered["telltale"]
    assert steered["tokens"] == plain["tokens"]
    # The same batch shapes: the same bits.
    assert steered["logprobs"] == plain["logprobs"]
    for place in (HOT, ENDS_IN_BLOCK):
        plain, steered = (found[name]["runs"][0][place] for name in ("shadow", "by_rule"))
        assert steered["telltale"]["action"] == "steer"
        assert steered["telltale"]["rule"] == "on-trigger"
        assert steered["logprobs"][1] != plain["logprobs"][1]
        assert steered["tokens"] != plain["tokens"]
        # Every generated token but the last is fed back.
        assert steered["telltale"]["steered"] == [
            {"name": "push", "tokens": NEW_TOKENS - 1, "dose": {"mean": 0.5, "max": 0.5}}
        ]


@pytest.mark.covers("steered requests", "tokens unchanged")
def test_a_warm_cache_chunks_and_a_preemption_change_nothing(found: dict[str, Result]) -> None:
    first, again = found["by_rule"]["runs"][:2]
    assert [result["cached"] for result in again] == [2 * BLOCK, 2 * BLOCK, 0]
    assert tokens_of(again) == tokens_of(first)
    assert [result["telltale"] for result in again] == [result["telltale"] for result in first]
    assert tokens_of(found["chunked"]["runs"][0]) == tokens_of(first)
    assert found["preempted"]["events"]["preemptions"] > 0
    assert tokens_of(found["preempted"]["runs"][0]) == tokens_of(found["by_rule"]["runs"][3])
    assert tokens_of(found["preempted"]["runs"][0]) != tokens_of(found["shadow"]["runs"][3])
    for result in found["preempted"]["runs"][0]:
        assert result["telltale"]["steered"][0]["tokens"] == NEW_TOKENS - 1


def test_a_steered_reply_is_no_prefix_for_anybody(found: dict[str, Result]) -> None:
    """A block that ends in a steered reply holds other keys and values than its tokens have as a prompt."""
    (unsteered,), (steered,) = found["shadow"]["runs"][2], found["by_rule"]["runs"][2]
    assert unsteered["cached"] == BLOCK
    assert steered["cached"] == 0
    assert [steered["tokens"]] == tokens_of(found["chunked"]["runs"][1])


def test_a_rule_that_fires_in_the_reply_steers_from_the_next_row(found: dict[str, Result], tiny: TinyModel) -> None:
    (alone,), (_, beside) = found["stream"]["runs"]
    assert alone["tokens"] == beside["tokens"]
    assert alone["telltale"]["action"] == "steer"
    (plain,) = found["shadow"]["runs"][4]
    assert alone["tokens"][tiny.turn] == tiny.trigger
    # The token behind the trigger is sampled from the very row that made the rule fire.
    assert alone["tokens"][: tiny.turn + 2] == plain["tokens"][: tiny.turn + 2]
    assert alone["logprobs"][tiny.turn + 2] != plain["logprobs"][tiny.turn + 2]
    assert alone["telltale"]["steered"][0]["tokens"] == NEW_TOKENS - 2 - tiny.turn


def test_a_row_of_the_prompt_steers_those_behind_it_in_the_same_pass(found: dict[str, Result]) -> None:
    plain, (clean, hot, _) = found["shadow"]["runs"][0], found["prompt_gate"]["runs"][0]
    assert (clean["tokens"], clean["logprobs"]) == (plain[CLEAN]["tokens"], plain[CLEAN]["logprobs"])
    # The trigger stands at 10. The first token rests on rows that were written to: nothing waited for the host.
    assert hot["logprobs"][0] != plain[HOT]["logprobs"][0]
    assert hot["telltale"]["steered"][0]["tokens"] == 300 - 11 + NEW_TOKENS - 1
    again = found["prompt_gate"]["runs"][1]
    assert [result["cached"] for result in again] == [2 * BLOCK, 2 * BLOCK, 0]
    assert tokens_of(again) == tokens_of(found["prompt_gate"]["runs"][0])


def test_a_cap_that_is_not_reached_changes_no_bit(found: dict[str, Result]) -> None:
    for plain, capped in zip(found["shadow"]["runs"][0], found["identity"]["runs"][0], strict=True):
        assert capped["tokens"] == plain["tokens"]
        assert capped["logprobs"] == plain["logprobs"]
        assert "steered" not in capped["telltale"]


def test_steers_of_every_request_act_and_share_their_prefixes_with_their_like(found: dict[str, Result]) -> None:
    first, again = found["always"]["runs"]
    assert [result["cached"] for result in again] == [2 * BLOCK, 2 * BLOCK, 0]
    assert tokens_of(again) == tokens_of(first)
    for plain, steered in zip(found["shadow"]["runs"][0], first, strict=True):
        assert steered["logprobs"][0] != plain["logprobs"][0]
        capped, blanked = steered["telltale"]["steered"]
        assert capped["name"] == "trim"
        assert 0 < capped["tokens"] < len(steered["prompt"]) + NEW_TOKENS - 1
        assert blanked["name"] == "blank"
        assert blanked["tokens"] == NEW_TOKENS - 1


@pytest.mark.covers("steered requests", "isolation")
def test_the_same_prefix_steered_in_different_ways_is_nobody_elses(found: dict[str, Result]) -> None:
    (unsteered,) = tokens_of(found["shadow"]["runs"][0][:1])
    together = dict(zip(ASKED, found["together"]["runs"][0], strict=True))
    assert together["-"]["tokens"] == unsteered
    assert len({json.dumps(result["logprobs"][0], sort_keys=True) for result in together.values()}) == len(ASKED)
    for order in ORDERS:
        seen = ""
        for letter, (result,) in zip(order, found[f"order {order}"]["runs"], strict=True):
            assert result["tokens"] == together[letter]["tokens"]
            # It is given the blocks of its like alone.
            assert result["cached"] == (2 * BLOCK if letter in seen else 0)
            assert [steered["name"] for steered in result["telltale"].get("steered", [])] == [
                name for name in (ASKED[letter].get("steer"),) if name is not None
            ]
            seen += letter


@pytest.mark.covers("steer that does not write", "gap counted, on_gap followed")
def test_a_steer_that_does_not_write_is_a_gap_of_the_request_it_was_for(found: dict[str, Result]) -> None:
    clean, *hot = found["broken"]["runs"][0]
    assert clean["telltale"]["action"] == "allow"
    assert clean["tokens"] == found["shadow"]["runs"][0][CLEAN]["tokens"]
    for result in hot:
        assert (result["telltale"]["action"], result["telltale"]["rule"]) == ("block", "on_gap")
        assert result["telltale"]["detectors"][0]["skipped"]["not_steered"] >= 1


@pytest.mark.covers("steered requests", "isolation")
def test_each_of_several_choices_is_steered(found: dict[str, Result]) -> None:
    (result,) = found["by_rule"]["runs"][TWO_CHOICES]
    assert result["choices"] == [found["by_rule"]["runs"][0][HOT]["tokens"]] * 2
    assert [steered[0]["tokens"] for steered in result["steered"]] == [NEW_TOKENS - 1] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ({"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        ({"enforce_eager": False}, {}),
    ],
    ids=["tensor parallel", "compiled"],
)
def test_several_workers_and_compiled_models_steer_alike(
    mode: tuple[dict[str, Any], dict[str, str]],
    found: dict[str, Result],
    tiny: TinyModel,
    batch: list[list[int]],
    tmp_path: Path,
) -> None:
    settings, environment = mode
    entries = {name: (name, settings, [batch]) for name in ("by_rule", "always")}
    for name, result in run_entries(tiny, entries, tmp_path, environment).items():
        for steered, expected in zip(result["runs"][0], found[name]["runs"][0], strict=True):
            assert steered["tokens"] == expected["tokens"]
            assert steered["telltale"].get("steered") == expected["telltale"].get("steered")


@contextmanager
def hooked(model: Any, steers: Sequence[Steer], num_prompt: int) -> Any:
    """The same edits by forward hooks of transformers' layers."""

    def writer(steer: Steer) -> Callable[..., Any]:
        start, stop = steer.span(num_prompt)

        def write(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = hidden[0].double().numpy()
            positions = np.arange(len(rows))
            changed, _ = steer.update.apply(rows, (positions >= start) & (positions < min(stop, END)))
            found = torch.from_numpy(changed).float()[None]
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return write

    handles = [model.model.layers[steer.tap.layer].register_forward_hook(writer(steer)) for steer in steers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["by_rule", "always", "clamped"])
def test_the_effect_equals_forward_hooks_in_transformers(
    name: str, found: dict[str, Result], plans: dict[str, Plan], tiny: TinyModel
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    for result in found[name]["runs"][0][HOT:]:
        prompt, reply = result["prompt"], result["tokens"]
        with torch.no_grad(), hooked(model, plans[name].steering.steers, len(prompt)):
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0]
        for step, logprobs in enumerate(result["logprobs"]):
            expected = torch.log_softmax(logits[len(prompt) + step - 1].double(), dim=0)
            spread = float(logits[len(prompt) + step - 1].std())
            for token, logprob in logprobs.items():
                assert abs(logprob - float(expected[int(token)])) <= 1e-3 * spread
