"""The offline steered model: it writes the definition's numbers to the named rows, and to no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from probes.fit.reading.padded import left_padded
from probes.fit.steer.dose_response import random_steer
from probes.fit.steer.side_effects import NeutralText
from probes.fit.steer.steered_model import SteeredModel, SteeredModelError
from probes.fit.steer.teacher_forced import Line, TeacherForced
from probes.steering.ablate import Ablate
from probes.steering.add import Add
from probes.steering.base import Operator, Vector
from probes.steering.cap import Cap
from probes.steering.steer import Positions, Steer
from probes.taps import Tap
from tests.support.planted import reference
from tests.support.tiny import D_MODEL, NUM_LAYERS, PROMPT, TinyModel, make_tiny_model

NORM = 2000.0
OPERATORS = (Add(strength=0.4), Ablate(strength=0.7), Cap(strength=0.9))
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("steered") / "tiny-llama")


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> SteeredModel:
    return SteeredModel(tiny.path, model=reference(tiny))


def steer_of(
    operator: Operator, *, positions: Positions = Positions.GENERATED, layer: int = 0, skip_first: int = 1
) -> Steer:
    direction = np.random.default_rng(5).standard_normal(D_MODEL)
    vector = Vector(direction / np.linalg.norm(direction), median_norm=NORM, mean=30.0, ceiling=-100.0)
    return Steer("test", Tap(layer), operator.update(vector, max_dose=1.0), positions, skip_first, NORM)


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [[int(token) for token in rng.integers(1000, 40000, size=length)] for length in (7, 23, 12, 1)]


def streams(model: SteeredModel, tokens: list[list[int]], steer: Steer | None, num_prompts: list[int]) -> torch.Tensor:
    """After the layer that is written to: with the write, if there is one."""
    kept: list[torch.Tensor] = []
    padded = left_padded(tokens)
    layer = model._layers[0]  # what a hook of our own sees
    keep = padded.tokens.shape[1]
    with model._written(steer, num_prompts, padded):
        handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
        with torch.inference_mode():
            model._forward(padded, use_cache=False, logits_to_keep=keep)
        handle.remove()
    return kept[0]


def test_without_a_steer_it_is_the_plain_model_to_the_bit(tiny: TinyModel, model: SteeredModel) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    tokens = sequences()[1]
    padded = left_padded([tokens])
    ours = model.logits(padded, steer=None, num_prompts=[5], keep=len(tokens))
    with torch.inference_mode():
        theirs = plain(input_ids=torch.tensor([tokens])).logits
    assert torch.equal(ours, theirs)
    # A plain pass after a steered one: no hook is left behind.
    model.logits(padded, steer=steer_of(OPERATORS[0]), num_prompts=[5], keep=1)
    assert torch.equal(model.logits(padded, steer=None, num_prompts=[5], keep=len(tokens)), theirs)


def test_greedy_replies_are_those_of_transformers(tiny: TinyModel, model: SteeredModel) -> None:
    prompt = model.chat(PROMPT)
    plain = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    theirs = plain.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
    found = model.generate([prompt], max_new_tokens=NEW_TOKENS)[0]
    assert list(found.tokens) == theirs.tolist()
    assert found.doses.size == 0


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.kind)
@pytest.mark.parametrize("positions", list(Positions))
def test_the_hook_is_the_definition_on_the_named_rows_and_nothing_elsewhere(
    model: SteeredModel, operator: Operator, positions: Positions
) -> None:
    tokens, num_prompts = sequences(), [3, 20, 12, 1]
    steer = steer_of(operator, positions=positions, skip_first=2)
    plain, written = streams(model, tokens, None, num_prompts), streams(model, tokens, steer, num_prompts)
    longest = plain.shape[1]
    changed = 0
    for place, (row, num_prompt) in enumerate(zip(tokens, num_prompts, strict=True)):
        start, stop = steer.span(num_prompt)
        where = np.array([start <= position < stop for position in range(len(row))])
        own = slice(longest - len(row), longest)
        expected, dose = steer.update.apply(plain[place, own].double().numpy(), where)
        np.testing.assert_allclose(written[place, own].numpy(), expected, rtol=1e-5, atol=1e-3)
        changed += int((dose > 0).sum())
        # Padding and rows that are not named keep their bits.
        assert torch.equal(written[place, own][~where], plain[place, own][~where])
        assert torch.equal(written[place, : own.start], plain[place, : own.start])
    assert changed > 0


def test_logits_before_the_first_written_row_keep_their_bits(model: SteeredModel) -> None:
    tokens = sequences()[1]
    padded, num_prompt = left_padded([tokens]), 9
    plain, steered = (
        model.logits(padded, steer=steer, num_prompts=[num_prompt], keep=len(tokens))[0]
        for steer in (None, steer_of(OPERATORS[0]))
    )
    assert torch.equal(plain[:num_prompt], steered[:num_prompt])
    assert (plain[num_prompt:] - steered[num_prompt:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.kind)
def test_a_padded_batch_answers_as_single_requests(model: SteeredModel, operator: Operator) -> None:
    prompts = [*sequences()[:2], model.chat(PROMPT)]
    steer = steer_of(operator)
    together = model.generate(prompts, steer=steer, max_new_tokens=NEW_TOKENS)
    alone = [model.generate([prompt], steer=steer, max_new_tokens=NEW_TOKENS)[0] for prompt in prompts]
    plain = model.generate(prompts, max_new_tokens=NEW_TOKENS)
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    assert [reply.tokens for reply in together] != [reply.tokens for reply in plain]
    for one, other, unsteered in zip(together, alone, plain, strict=True):
        np.testing.assert_allclose(one.doses, other.doses, rtol=1e-4, atol=1e-2)
        # The row of the last token is computed only where it gave the end of the reply.
        assert len(one.doses) == len(one.tokens) - (len(one.tokens) == NEW_TOKENS)
        # The first token never feels a steer of generated rows.
        assert one.tokens[0] == unsteered.tokens[0]


def test_doses_count_the_rows_of_the_span(model: SteeredModel) -> None:
    prompt = sequences()[1]
    for positions, rows in ((Positions.PROMPT, len(prompt) - 1), (Positions.ALL, len(prompt) - 1 + NEW_TOKENS - 1)):
        reply = model.generate([prompt], steer=steer_of(OPERATORS[0], positions=positions), max_new_tokens=NEW_TOKENS)[
            0
        ]
        assert len(reply.tokens) == NEW_TOKENS
        assert reply.doses == pytest.approx([0.4 * NORM] * rows)


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_resuming_behind_a_layer_gives_the_bits_of_a_whole_pass(model: SteeredModel, layer: int) -> None:
    lines = [Line(tuple(tokens), num_prompt=4, first=5) for tokens in sequences()[:3]]
    forced = TeacherForced(model, lines, layer=layer)
    for steer in (None, steer_of(OPERATORS[0], layer=layer), steer_of(OPERATORS[1], layer=layer)):
        found = dict(forced.predictions(steer))
        order = sorted(range(3), key=lambda i: -len(lines[i].tokens))
        padded = left_padded([lines[i].tokens for i in order])
        whole = model.logits(padded, steer=steer, num_prompts=[4] * 3, keep=padded.tokens.shape[1])
        for place, number in enumerate(order):
            looked_at = len(lines[number].tokens) - 5
            expected = torch.log_softmax(whole[place, -1 - looked_at : -1], dim=-1)
            assert torch.equal(found[number], expected)
    # Nothing is left of the detour.
    assert not any("forward" in vars(module) for module in model._layers)


def test_layers_that_take_more_than_the_stream_from_below_are_run_whole(model: SteeredModel) -> None:
    lower, upper = model._layers
    passed_on: list[torch.Tensor] = []
    # A second way from the lower layer to the upper one, past the stream.
    handles = [
        lower.mlp.register_forward_hook(lambda _module, _inputs, output: passed_on.append(output)),  # type: ignore[union-attr]
        upper.register_forward_pre_hook(
            lambda _module, inputs: (inputs[0] + passed_on.pop(), *inputs[1:]) if passed_on else None
        ),
    ]
    lines = [Line(tuple(tokens), num_prompt=4, first=5) for tokens in sequences()[:2]]
    try:
        found = dict(TeacherForced(model, lines, layer=0).predictions(None))[1]
        padded = left_padded([lines[1].tokens, lines[0].tokens])
        whole = model.logits(padded, steer=None, num_prompts=[4, 4], keep=padded.tokens.shape[1])[0, 4:-1]
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(found, torch.log_softmax(whole, dim=-1))
    assert not torch.equal(found, dict(TeacherForced(model, lines, layer=0).predictions(None))[1])


def test_a_token_s_log_probability_is_that_of_the_row_before_it(tiny: TinyModel, model: SteeredModel) -> None:
    tokens = tuple(sequences()[0])
    found = TeacherForced(model, [Line(tokens, num_prompt=3, first=3)], layer=0).of_tokens(None)[0]
    plain = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = torch.log_softmax(plain(input_ids=torch.tensor([tokens])).logits[0].double(), dim=-1)
    expected = [float(logits[position - 1, tokens[position]]) for position in range(3, len(tokens))]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_kl_is_zero_without_steering_and_grows_with_the_dose(model: SteeredModel) -> None:
    neutral = NeutralText(model, layer=0, lines=4)
    nothing = neutral.cost(None)
    assert (nothing.kl, nothing.ce_change) == (0.0, 0.0)
    costs = [neutral.cost(steer_of(Add(strength=strength))).kl for strength in (0.01, 0.1, 1.0)]
    assert 0 < costs[0] < costs[1] < costs[2]
    # Only the second half of a line is written to as if generated: the first half alone changes other rows.
    assert neutral.cost(steer_of(OPERATORS[0], positions=Positions.PROMPT)).kl > 0


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.kind)
def test_random_directions_have_the_length_and_give_each_row_the_same_dose(operator: Operator) -> None:
    steer = steer_of(operator)
    rows = np.random.default_rng(3).standard_normal((50, D_MODEL)) * NORM / D_MODEL**0.5
    drawn = [random_steer(steer, np.random.default_rng(seed)) for seed in range(3)]
    for other in drawn:
        assert np.linalg.norm(other.update.write) == pytest.approx(np.linalg.norm(steer.update.write))
        np.testing.assert_array_equal(other.update.coefficient(rows), steer.update.coefficient(rows))
        assert abs(other.update.write @ steer.update.write) < 0.5
    assert not np.allclose(drawn[0].update.write, drawn[1].update.write)


def test_a_steer_of_another_model_is_refused(model: SteeredModel) -> None:
    steer = replace(steer_of(OPERATORS[0]), tap=Tap(NUM_LAYERS))
    with pytest.raises(SteeredModelError, match="It belongs to another model"):
        model.generate([[1, 2, 3]], steer=steer, max_new_tokens=4)
