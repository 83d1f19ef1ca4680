"""What is fitted beside linear and token probes: ensembles, novelty, drift, lenses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from probes.artifact import Artifact
from probes.detectors import load_detector
from probes.fit.evaluation.measure import auroc
from probes.fit.fitters.logistic import Logistic
from probes.fit.training.drift import fit_drift
from probes.fit.training.ensemble import SideBySide, ensemble_tensors
from probes.fit.training.lens import LensError, lens_tensors
from probes.fit.training.novelty import NoveltyError, fit_novelty
from probes.taps import Tap
from tests.unit.artifacts import make_card, model_ref

WIDTH = 24


def detector_of(kind: str, tensors: dict[str, np.ndarray], *, layers: tuple[int, ...] = (0,), width: int = WIDTH):  # type: ignore[no-untyped-def]
    card = make_card("d", kind=kind, layers=layers, model=model_ref(d_model=width))
    return load_detector(Artifact(Path("d.safetensors"), card, tensors))


def layers_of(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """(n, 4, WIDTH): each layer sees the same thing weakly, with noise of its own, and each in its own units."""
    found = []
    for layer in range(4):
        direction = np.random.default_rng(layer).standard_normal(WIDTH)
        rows = rng.standard_normal((len(labels), WIDTH)) + 0.22 * labels[:, None] * direction
        found.append((rows * 10.0**layer + layer).astype(np.float32))
    return np.stack(found, axis=1)


def test_an_ensemble_beats_its_members_and_is_served_as_fitted() -> None:
    rng = np.random.default_rng(0)
    labels, truth = (np.arange(count) % 2 for count in (3000, 2000))
    member = Logistic(inverse_penalty=0.01)
    known, tried = layers_of(rng, labels), layers_of(rng, truth)
    probe = SideBySide(member=member, taps=4).fit(known.reshape(len(labels), -1), labels)
    found = probe.score(tried.reshape(len(truth), -1))
    alone = [auroc(member.fit(known[:, i], labels).score(tried[:, i]), truth) for i in range(4)]
    assert auroc(found, truth) > max(alone) + 0.03
    detector = detector_of("ensemble", ensemble_tensors(probe, 4), layers=(0, 1, 2, 3))
    readouts = detector.read({Tap(layer): tried[:, layer] for layer in range(4)})
    served = detector.score(readouts)
    assert np.abs(served - found).max() <= 1e-6 * max(1.0, float(found.std()))
    # One layer more or less changes little: none of them decides alone.
    for tap, readout in readouts.items():
        assert abs(auroc(served - readout[:, 0], truth) - auroc(served, truth)) < 0.1, tap


def test_novelty_scores_one_on_its_own_kind_and_more_on_another() -> None:
    rng = np.random.default_rng(1)
    loadings = rng.standard_normal((5, WIDTH)) * 3
    draw = lambda count: rng.standard_normal((count, 5)) @ loadings + rng.standard_normal((count, WIDTH)) + 7  # noqa: E731
    detector = detector_of("novelty", fit_novelty(draw(6000), components=5))
    own = detector.score(detector.read({Tap(0): draw(4000)}))
    assert own.mean() == pytest.approx(1.0, abs=0.03)
    assert stats.kstest(own * WIDTH, stats.chi2(WIDTH).cdf).statistic < 0.03
    other = rng.standard_normal((4000, 5)) @ rng.standard_normal((5, WIDTH)) * 3 + 7
    labels = np.repeat([0, 1], 4000)
    assert auroc(np.concatenate([own, detector.score(detector.read({Tap(0): other}))]), labels) > 0.95


@pytest.mark.parametrize(("rows", "components"), [(100, 32), (500, 24), (500, 0)])
def test_novelty_needs_rows(rows: int, components: int) -> None:
    with pytest.raises(NoveltyError, match=f"{rows} rows are there"):
        fit_novelty(np.zeros((rows, WIDTH)), components=components)


def test_drift_finds_what_moves_whatever_the_request_began_with() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(2000) % 2
    start = rng.standard_normal((2000, WIDTH)) * 20
    moved = start + rng.standard_normal((2000, WIDTH)) + labels[:, None] * np.eye(WIDTH)[3] * 3
    tensors = fit_drift(start[:1000], moved[:1000], labels[:1000], fitter=Logistic(inverse_penalty=0.1))
    detector = detector_of("drift", tensors)
    before, after = (detector.score(detector.read({Tap(0): rows[1000:]})) for rows in (start, moved))
    assert auroc(after - before, labels[1000:]) > 0.95
    # What the request began with says nothing, and hides what the last row alone would say.
    assert auroc(after, labels[1000:]) < 0.75


def llama(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        network.model.norm.weight.uniform_(0.5, 2.0)
    network.save_pretrained(folder)
    return network


def test_a_lens_after_the_last_layer_is_what_the_model_says(tmp_path: Path) -> None:
    llama(tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens, contrast = [3, 17], [40, 41, 59]
    captured: list[torch.Tensor] = []
    handle = network.model.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        logits = network(torch.arange(30)[None]).logits[0].double()
    handle.remove()
    expected = torch.logsumexp(logits[:, tokens], dim=1) - torch.logsumexp(logits[:, contrast], dim=1)
    detector = detector_of("lens", lens_tensors(tmp_path, tokens, contrast), layers=(1,))
    found = detector.score(detector.read({Tap(1): captured[0].reshape(-1, WIDTH).numpy()}))
    assert np.abs(found - expected.numpy()).max() < 1e-4


@pytest.mark.parametrize(("tokens", "contrast"), [([], [1]), ([1], []), ([1, 2], [2]), ([1, 1], [2])])
def test_sets_that_say_nothing_are_refused(tokens: list[int], contrast: list[int], tmp_path: Path) -> None:
    with pytest.raises(LensError, match="none may be named twice"):
        lens_tensors(tmp_path, tokens, contrast)


def test_a_model_without_an_rms_norm_has_no_lens(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=60)).save_pretrained(tmp_path)
    with pytest.raises(LensError, match="has no final norm"):
        lens_tensors(tmp_path, [1], [2])
