"""Capturing: the identity gives back the stream's own bits, rows find their place, and none may be missing."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monitor.segments import Codes
from monitor.types import Role
from probes.artifact import ArtifactError
from probes.bank import Bank, BankError
from probes.detectors import detector_kinds, load_detector
from probes.fit.reading.activation_manifest import TokenPositions
from probes.fit.reading.activation_writer import ActivationWriter, PreparedRequest, ShardBuffer, shards_of
from probes.taps import Tap
from serving.engine import ops
from serving.engine.capture import CAPTURE_KEY, Capture, capture_bank, captured_taps
from serving.engine.capture_rows import CaptureError, CaptureRows
from serving.engine.kept_tokens import KeptTokensError, kept_tokens
from serving.engine.readouts import WorkerReadouts
from serving.engine.runtime import CONFIG_VARIABLE, RuntimeConfigError, load_worker_plan
from tests.unit.artifacts import D_MODEL, NUM_LAYERS, make_card, saved_artifact
from tests.unit.collected import ROLES, TAPS, activations, requests, settings

Chunk = tuple[int, int, int]
"""A request's number, and its positions from and to."""
PREEMPTED = 0.2


@pytest.fixture(scope="module")
def bank() -> Bank:
    return capture_bank([Tap.parse(tap) for tap in TAPS], d_model=D_MODEL, num_layers=NUM_LAYERS)


def row_values(made: Sequence[PreparedRequest], bank: Bank, chunk: Chunk) -> np.ndarray:
    """What the taps read of some positions: each tap's activation, then its squared norm."""
    number, first, stop = chunk
    parts = []
    for tap in bank.taps:
        rows = activations(made[number], str(tap))[first:stop]
        parts += [rows, np.square(rows).sum(axis=1, keepdims=True)]
    return np.concatenate(parts, axis=1)


def step(made: Sequence[PreparedRequest], bank: Bank, chunks: Sequence[Chunk]) -> WorkerReadouts:
    return WorkerReadouts(
        [f"{number}-x" for number, _, _ in chunks],
        np.array([stop - first for _, first, stop in chunks], dtype=np.int64),
        np.concatenate([np.arange(first, stop) for _, first, stop in chunks]).astype(np.int64),
        np.concatenate([row_values(made, bank, chunk) for chunk in chunks]).astype(np.float32),
    )


def prepared(made: Sequence[PreparedRequest], bank: Bank) -> tuple[ShardBuffer, CaptureRows]:
    shard = ShardBuffer(made, settings(len(made)))
    rows = CaptureRows(shard, bank)
    for number in range(len(made)):
        rows.expect(f"{number}-x", number)
    return shard, rows


def take(rows: CaptureRows, sent: WorkerReadouts) -> None:
    rows.take(dict(zip(sent.request_ids, sent.counts.tolist(), strict=True)), sent)


def require_filled(shard: ShardBuffer) -> None:
    for tap, found in shard.activations.items():
        expected = [activations(request, tap)[request.first : request.stop] for request in shard.requests]
        np.testing.assert_array_equal(found, np.concatenate(expected))


def test_the_identity_gives_back_the_streams_own_bits() -> None:
    wide = capture_bank([Tap(1)], d_model=96, num_layers=2)
    (matrix,) = wide.matrices
    generator = torch.Generator().manual_seed(2)
    hidden, residual = torch.randn(2, 33, 96, generator=generator).unbind()
    hidden[0] *= 1e4  # a sink
    out = torch.full((40, 97), float("nan"))
    ops.read_rows(
        hidden, residual, torch.from_numpy(matrix.weight), torch.from_numpy(matrix.bias), out, torch.zeros(1).long()
    )
    assert torch.equal(out[:33, :96], hidden + residual)
    torch.testing.assert_close(out[:33, 96], (hidden + residual).square().sum(dim=1))


def test_a_capture_is_no_kind_that_can_be_served(tmp_path: Path) -> None:
    assert Capture.kind not in detector_kinds()
    artifact = saved_artifact(tmp_path, make_card().model_copy(update={"kind": Capture.kind}))
    with pytest.raises(ArtifactError, match="'capture', which this version does not know"):
        load_detector(artifact)
    with pytest.raises(ArtifactError, match="cannot be served"):
        Capture.from_artifact(artifact, name="capture")


def test_its_score_is_the_length_of_what_is_read(bank: Bank) -> None:
    made = requests(1)
    readouts = row_values(made, bank, (0, 0, len(made[0].tokens)))
    both = np.concatenate([activations(made[0], tap) for tap in TAPS], axis=1).astype(np.float64)
    np.testing.assert_allclose(bank.score(readouts)[:, 0], np.linalg.norm(both, axis=1), rtol=1e-6)


@pytest.mark.parametrize("taps", [[Tap(NUM_LAYERS)], [Tap(1), Tap(1)]])
def test_impossible_taps_are_refused(taps: list[Tap]) -> None:
    with pytest.raises(BankError):
        capture_bank(taps, d_model=D_MODEL, num_layers=NUM_LAYERS)


def test_a_server_does_not_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(additional_config={CAPTURE_KEY: list(TAPS)})
    assert [str(tap) for tap in captured_taps(config)] == list(TAPS)
    monkeypatch.setenv(CONFIG_VARIABLE, "telltale.yaml")
    with pytest.raises(RuntimeConfigError, match=CAPTURE_KEY):
        load_worker_plan(config)


def schedule(made: Sequence[PreparedRequest], draw: random.Random) -> Iterator[list[Chunk]]:
    """Requests cut into chunks, chunks of different requests in one step, some requests begun again."""
    left = {number: 0 for number in range(len(made))}
    while left:
        chunks: list[Chunk] = []
        for number in draw.sample(sorted(left), draw.randint(1, len(left))):
            # Now and then one is preempted, and computed again from its beginning.
            first = 0 if draw.random() < PREEMPTED else left[number]
            stop = draw.randint(first + 1, len(made[number].tokens))
            chunks.append((number, first, stop))
            left[number] = stop
            if stop == len(made[number].tokens):
                del left[number]
        yield chunks


@given(st.integers(1, 6), st.integers(0, 999), st.randoms(use_true_random=True))
def test_rows_find_their_place_however_they_come(bank: Bank, count: int, seed: int, draw: random.Random) -> None:
    made = requests(count, longest=12, seed=seed)
    shard, rows = prepared(made, bank)
    for chunks in schedule(made, draw):
        take(rows, step(made, bank, chunks))
    rows.take({}, None)  # a step without tokens
    rows.finish()
    assert rows.tokens_seen == sum(len(request.tokens) for request in made)
    require_filled(shard)


def test_what_comes_behind_the_prompt_is_not_kept(bank: Bank) -> None:
    made = requests(2)
    shard, rows = prepared(made, bank)
    length = len(made[0].tokens)
    take(rows, step(made, bank, [(0, 0, length), (1, 0, len(made[1].tokens))]))
    decoded = WorkerReadouts(
        ["0-x"], np.array([1]), np.array([length]), np.full((1, bank.width), 7.0, dtype=np.float32)
    )
    take(rows, decoded)
    rows.finish()
    require_filled(shard)


def long_requests(bank: Bank) -> tuple[list[PreparedRequest], ShardBuffer, CaptureRows]:
    made = [request for request in requests(20) if len(request.tokens) > 8][:2]
    return made, *prepared(made, bank)


def test_a_position_that_is_left_out_is_an_error(bank: Bank) -> None:
    made, _, rows = long_requests(bank)
    take(rows, step(made, bank, [(0, 0, 3), (1, 0, 4)]))
    with pytest.raises(CaptureError, match=f"line {made[0].record.line}: rows of the positions 4 to 5 .* 3 was next"):
        take(rows, step(made, bank, [(0, 4, 6)]))


def test_a_request_that_ends_early_is_an_error(bank: Bank) -> None:
    made, _, rows = long_requests(bank)
    take(rows, step(made, bank, [(0, 0, len(made[0].tokens)), (1, 0, 4)]))
    with pytest.raises(CaptureError, match=f"line {made[1].record.line}: 4 of its {len(made[1].tokens)} tokens"):
        rows.finish()


def test_rows_in_disorder_are_an_error(bank: Bank) -> None:
    made, _, rows = long_requests(bank)
    sent = step(made, bank, [(0, 0, 4)])
    sent.positions[1:3] = sent.positions[2:0:-1].copy()
    with pytest.raises(CaptureError, match="rows of the positions 0 to 3"):
        take(rows, sent)


@pytest.mark.parametrize("tap", range(len(TAPS)))
def test_a_tap_that_did_not_run_is_an_error(bank: Bank, tap: int) -> None:
    made, _, rows = long_requests(bank)
    sent = step(made, bank, [(1, 0, 4), (0, 0, 4)])
    sent.readouts[5, tap * (D_MODEL + 1) : (tap + 1) * (D_MODEL + 1)] = np.nan
    with pytest.raises(CaptureError, match=f"line {made[0].record.line}: a tap did not run"):
        take(rows, sent)


def test_rows_of_nobody_and_steps_without_rows_are_errors(bank: Bank) -> None:
    made, _, rows = long_requests(bank)
    with pytest.raises(CaptureError, match="without readouts"):
        rows.take({"0-x": 3}, None)
    sent = step(made, bank, [(0, 0, 3)])
    for scheduled in ({"0-x": 4}, {"0-x": 3, "1-x": 1}, {"1-x": 3}):
        with pytest.raises(CaptureError, match="came back with 3 rows for 1"):
            rows.take(scheduled, sent)
    stranger = WorkerReadouts(["9-x"], sent.counts, sent.positions, sent.readouts)
    with pytest.raises(CaptureError, match="nobody sent"):
        take(rows, stranger)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("tap", range(len(TAPS)))
def test_sinks_are_found_by_their_norm_at_any_tap(bank: Bank, sinks: int, tap: int) -> None:
    made = [request for request in requests(40) if len(request.tokens) > 6]
    _, rows = prepared(made, bank)
    for number, request in enumerate(made):
        sent = step(made, bank, [(number, 0, len(request.tokens))])
        norms = sent.readouts[:, [D_MODEL, 2 * D_MODEL + 1]]
        norms[:] = np.random.default_rng(number).uniform(1.0, 4.0, size=norms.shape)
        if sinks:
            norms[sinks - 1, tap] = 1e6
        sent.readouts[:, [D_MODEL, 2 * D_MODEL + 1]] = norms
        take(rows, sent)
    assert rows.finish() == sinks


def collect_into(folder: Path, made: Sequence[PreparedRequest], bank: Bank) -> None:
    chosen = settings(len(made), shard_tokens=2000)
    with ActivationWriter(folder, chosen, roles=ROLES) as writer:
        for batch in shards_of(made, chosen):
            shard, rows = prepared(batch, bank)
            for number, request in enumerate(batch):
                take(rows, step(batch, bank, [(number, 0, len(request.tokens))]))
            writer.write(shard, sinks=rows.finish())
        writer.finish()


def test_memory_does_not_grow_with_the_number_of_requests(tmp_path: Path, bank: Bank) -> None:
    def peak(count: int) -> int:
        made = requests(count, longest=200)
        tracemalloc.start()
        try:
            collect_into(tmp_path / str(count), made, bank)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(40)  # what is imported and cached on the way
    few, many = peak(100), peak(500)
    shards = len(list((tmp_path / "500").glob("*.safetensors")))
    assert shards > 4 * len(list((tmp_path / "100").glob("*.safetensors")))
    assert many < 1.15 * few


def codes(*runs: tuple[Role, int]) -> Codes:
    return np.repeat(np.array([role.code for role, _ in runs], dtype=np.uint8), [length for _, length in runs])


CHAT = codes((Role.TEMPLATE, 3), (Role.SYSTEM, 4), (Role.TEMPLATE, 4), (Role.USER, 5), (Role.TEMPLATE, 5))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (TokenPositions.LAST, range(20, 21)),
        (TokenPositions.TEMPLATE, range(16, 21)),
        (TokenPositions.RESPONSE, range(21, 30)),
        (TokenPositions.PROMPT, range(21)),
        (TokenPositions.ALL, range(30)),
    ],
)
def test_positions_are_what_their_names_say(positions: TokenPositions, expected: range) -> None:
    assert kept_tokens(positions, CHAT, num_prompt=21, num_tokens=30) == expected


@pytest.mark.parametrize(
    ("positions", "prompt", "num_prompt", "why"),
    [
        (TokenPositions.RESPONSE, CHAT, 21, "no reply"),
        (TokenPositions.TEMPLATE, None, 21, "could not be told apart"),
        (TokenPositions.TEMPLATE, CHAT[:16], 16, "no token of the chat template"),
    ],
)
def test_tokens_that_are_not_there_are_refused(
    positions: TokenPositions, prompt: Codes | None, num_prompt: int, why: str
) -> None:
    with pytest.raises(KeptTokensError, match=why):
        kept_tokens(positions, prompt, num_prompt=num_prompt, num_tokens=num_prompt)


def test_a_prompt_of_template_tokens_alone_is_all_template() -> None:
    assert kept_tokens(TokenPositions.TEMPLATE, codes((Role.TEMPLATE, 4)), num_prompt=4, num_tokens=4) == range(4)
