"""Gates in a real engine: what a row opens in a pass is written in that pass, the same in every mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from monitor.policy import Plan
from serving.deployment import check_policy
from tests.engine.modes import SETTINGS
from tests.engine.steering_runs import BLOCK, FEW_BLOCKS, HEAD, NEW_TOKENS, Result, random_tokens, run_entries
from tests.support.tiny import D_MODEL, TinyModel, save_direction

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CLEAN, HOT, ENDS_IN_BLOCK = 0, 1, 2
"""Places in a batch: 300 tokens without the trigger, 300 with it as number 10 and as the last, and 120 likewise."""
AT = 10
WORDS = (1200, 1300, 1400)

LATCHED = "{action: steer, steer: gated_push, gate: latched}"
STEERS = "  - {{name: gated_push, artifact: gated_push.safetensors, op: add, strength: 0.5, positions: {positions}}}"
POLICIES = {
    "unsteered": ("generated", "stream", LATCHED, "shadow"),
    "gate_prompt": ("all", "prompt", LATCHED, "enforce"),
    "gate_token": ("all", "prompt", LATCHED.replace("latched", "token"), "enforce"),
    "gate_stream": ("generated", "stream", LATCHED, "enforce"),
}


@pytest.fixture(scope="module")
def plans(tiny: TinyModel) -> dict[str, Plan]:
    folder = tiny.path.parent
    direction = np.random.default_rng(12).standard_normal(D_MODEL)
    direction[0] = 0  # what the detector reads
    save_direction(folder / "gated_push.safetensors", tiny.path, direction / np.linalg.norm(direction))
    for name, (positions, stage, do, mode) in POLICIES.items():
        steers = STEERS.format(positions=positions)
        (folder / f"{name}.yaml").write_text(HEAD.format(steers=steers, always="", stage=stage, do=do, mode=mode))
    return {name: check_policy(folder / f"{name}.yaml") for name in POLICIES}


@pytest.fixture(scope="module")
def few_words(tiny: TinyModel) -> list[list[int]]:
    """Prompts of four words, among them the trigger: what follows one in them is drafted, and mostly rejected."""
    generator = np.random.default_rng(8)
    return [[int(token) for token in generator.choice([*WORDS, tiny.trigger], size=24)] for _ in range(8)]


@pytest.fixture(scope="module")
def found(
    tiny: TinyModel,
    plans: dict[str, Plan],
    few_words: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Result]:
    trigger = tiny.trigger

    def tokens(seed: int, length: int, hot: int | None = trigger) -> list[int]:
        made = random_tokens(seed, length, trigger=hot, without=trigger)
        # What is written to the last row alone shows in the next token.
        return made if hot is None else [*made[:-1], hot]

    batch = [tokens(1, 300, None), tokens(2, 300), tokens(3, 120)]
    twins = [tokens(4, 300)] * 2
    crowd = [tokens(20 + number, 120 + number) for number in range(4)]
    follow = [{"follow": [0, ENDS_IN_BLOCK], "more": batch[CLEAN][:30]}]
    chunked = {"enable_prefix_caching": False, "max_num_batched_tokens": 64}
    entries: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
        "unsteered": ("unsteered", {}, [batch]),
        "prompt": ("gate_prompt", {}, [batch, batch, twins, crowd, follow]),
        "prompt_chunked": ("gate_prompt", chunked, [batch, follow, twins]),
        "prompt_preempted": ("gate_prompt", FEW_BLOCKS | {"max_num_batched_tokens": 512}, [crowd]),
        "token": ("gate_token", {}, [batch, batch]),
        "token_chunked": ("gate_token", chunked, [batch]),
        "stream_words": ("gate_stream", {}, [few_words, few_words]),
        "unsteered_words": ("unsteered", {}, [few_words]),
        "stream_drafts": ("gate_stream", SETTINGS["ngram"], [few_words]),
    }
    worded = [name for name in entries if name.endswith(("words", "drafts"))]
    folder = tmp_path_factory.mktemp("gates")
    return run_entries(tiny, entries, folder, words=(*WORDS, trigger), worded=worded)


def replies(run: Sequence[Result]) -> list[tuple[list[int], Any]]:
    """Tokens and what is told of each request, without how it was judged."""
    return [(result["tokens"], result["telltale"].get("steered")) for result in run]


@pytest.mark.covers("steered requests", "isolation")
@pytest.mark.parametrize(("name", "tokens"), [("prompt", 300 - AT - 1 + NEW_TOKENS - 1), ("token", 2)])
def test_a_row_of_the_prompt_steers_in_the_pass_that_computes_it(
    found: dict[str, Result], name: str, tokens: int
) -> None:
    plain, gated = found["unsteered"]["runs"][0], found[name]["runs"][0]
    assert gated[CLEAN]["tokens"] == plain[CLEAN]["tokens"]
    # The same batch shapes: the same bits.
    assert gated[CLEAN]["logprobs"] == plain[CLEAN]["logprobs"]
    assert "steered" not in gated[CLEAN]["telltale"]
    # No round trip: the first token already rests on rows that were written to.
    assert gated[HOT]["logprobs"][0] != plain[HOT]["logprobs"][0]
    assert gated[HOT]["telltale"]["action"] == "steer"
    dose = {"mean": 0.5, "max": 0.5}
    assert gated[HOT]["telltale"]["steered"] == [{"name": "gated_push", "tokens": tokens, "dose": dose}]


@pytest.mark.covers("steered requests", "tokens unchanged")
@pytest.mark.parametrize("name", ["prompt", "token"])
def test_a_warm_cache_and_chunks_change_nothing(found: dict[str, Result], name: str) -> None:
    first, again = found[name]["runs"][:2]
    assert [result["cached"] for result in again] == [2 * BLOCK, 2 * BLOCK, 0]
    assert [result["tokens"] for result in again] == [result["tokens"] for result in first]
    assert [result["telltale"]["action"] for result in again] == ["allow", "steer", "steer"]
    assert replies(found[f"{name}_chunked"]["runs"][0]) == replies(first)


def test_a_preemption_changes_nothing(found: dict[str, Result]) -> None:
    assert found["prompt_preempted"]["events"]["preemptions"] > 0
    assert replies(found["prompt_preempted"]["runs"][0]) == replies(found["prompt"]["runs"][3])


def test_a_prefix_that_is_still_computed_is_not_taken_for_one_that_is_known(found: dict[str, Result]) -> None:
    first, second = found["prompt"]["runs"][2]
    assert first["cached"] == second["cached"] == 0
    assert replies([first]) == replies([second]) == replies(found["prompt_chunked"]["runs"][2][:1])


def test_a_reply_is_read_again_as_a_part_of_the_next_prompt(found: dict[str, Result]) -> None:
    (after,) = found["prompt"]["runs"][4]
    assert after["cached"] == 0
    assert replies([after]) == replies(found["prompt_chunked"]["runs"][1])


def test_rejected_drafts_open_nothing_and_accepted_ones_do(found: dict[str, Result], tiny: TinyModel) -> None:
    plain, steered = found["unsteered_words"]["runs"][0], found["stream_words"]["runs"][0]
    drafted = found["stream_drafts"]
    assert drafted["events"]["rejected"] > 0
    assert drafted["events"]["accepted"] > 0
    assert replies(drafted["runs"][0]) == replies(steered) == replies(found["stream_words"]["runs"][1])
    assert any(left["tokens"] != right["tokens"] for left, right in zip(plain, steered, strict=True))
    for result in steered:
        said = result["tokens"]
        behind = NEW_TOKENS - 2 - said.index(tiny.trigger) if tiny.trigger in said else 0
        told = result["telltale"].get("steered", [{"tokens": 0}])
        assert told[0]["tokens"] == max(behind, 0)


@pytest.mark.parametrize(
    ("settings", "environment"),
    [({"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}), ({"enforce_eager": False}, {})],
    ids=["tensor parallel", "compiled"],
)
def test_several_workers_and_compiled_models_open_the_same_gates(
    settings: dict[str, Any], environment: dict[str, str], found: dict[str, Result], tiny: TinyModel, tmp_path: Path
) -> None:
    batch = [result["prompt"] for result in found["prompt"]["runs"][0]]
    entries = {name: (f"gate_{name}", settings, [batch]) for name in ("prompt", "token")}
    for name, result in run_entries(tiny, entries, tmp_path, environment).items():
        assert replies(result["runs"][0]) == replies(found[name]["runs"][0])


def test_the_v2_runner_steers_as_the_other_one(found: dict[str, Result], tiny: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels of V2 are Triton's")
    trigger = tiny.trigger
    batch = [
        random_tokens(30 + number, length, trigger=hot, without=trigger)
        for number, (length, hot) in enumerate(((30, None), (40, trigger), (150, trigger)))
    ]
    settings = {"max_num_batched_tokens": 64}
    entries = {name: (name, settings, [batch, batch]) for name in ("unsteered", "gate_prompt", "gate_stream")}
    runs = [
        run_entries(tiny, entries, tmp_path, program=program, new_tokens=6)
        for program in ("tests.engine.steered", "tests.engine.steered_v2")
    ]
    for name in entries:
        v1, v2 = (run[name]["runs"] for run in runs)
        assert [replies(each) for each in v2] == [replies(each) for each in v1]
        assert v2[1][-1]["cached"] == BLOCK
    plain, gated = (runs[1][name]["runs"][0] for name in ("unsteered", "gate_prompt"))
    assert gated[0]["tokens"] == plain[0]["tokens"]
    for number, length in ((1, 40), (2, 150)):
        assert gated[number]["telltale"]["steered"][0]["tokens"] == length - AT - 1 + 5
        assert gated[number]["logprobs"][0] != plain[number]["logprobs"][0]


@contextmanager
def hooked(model: Any, plan: Plan, written: np.ndarray) -> Any:
    """The same edits by a forward hook of transformers' layer."""
    (steer,) = plan.steering.steers

    def write(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed, _ = steer.update.apply(hidden[0].double().numpy(), written)
        found = torch.from_numpy(changed).float()[None]
        return (found, *output[1:]) if isinstance(output, tuple) else found

    handle = model.model.layers[steer.tap.layer].register_forward_hook(write)
    try:
        yield
    finally:
        handle.remove()


BEHIND: Mapping[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "prompt": lambda positions, num_prompt: positions > AT,
    "token": lambda positions, num_prompt: (positions == AT) | (positions == num_prompt - 1),
}


@pytest.mark.parametrize("name", list(BEHIND))
def test_the_effect_equals_a_forward_hook_in_transformers(
    name: str, found: dict[str, Result], plans: dict[str, Plan], tiny: TinyModel
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    for result in found[name]["runs"][0][HOT:]:
        prompt, reply = result["prompt"], result["tokens"]
        written = BEHIND[name](np.arange(len(prompt) + len(reply)), len(prompt))
        with torch.no_grad(), hooked(model, plans[f"gate_{name}"], written):
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0]
        for step, logprobs in enumerate(result["logprobs"]):
            row = logits[len(prompt) + step - 1].double()
            expected = torch.log_softmax(row, dim=0)
            for token, logprob in logprobs.items():
                assert abs(logprob - float(expected[int(token)])) <= 1e-3 * float(row.std())
