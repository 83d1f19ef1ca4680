"""The benchmark from end to end on the tiny model: two real servers, both workloads, and the prefix computed once."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.bench.load import Burst, Steady, Workload
from serving.bench.machine import read_machine
from serving.bench.report import Report, Setting
from serving.bench.session import Subject, describe, measure
from serving.commands.bench import require_sound
from tests.support.server import SMALL
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = (1, 1)
LAYERS = (0, 1)
WORKLOAD = Workload(Steady(concurrent=3, output_tokens=8, single=3), Burst(output_tokens=4))


def test_both_workloads_in_one_session(tiny: TinyModel, tmp_path: Path) -> None:
    flags = ("--host", "127.0.0.1", *SMALL, "--enable-prefix-caching", "--max-num-batched-tokens", "2048")
    subject = Subject(str(tiny.path), tiny.path.name, tiny.path, flags, LAYERS)
    said: list[str] = []
    measured = measure(subject, tmp_path, WORKLOAD, rounds=ROUNDS, progress=said.append)
    comparison = measured.comparison
    starting = [line for line in said if line.startswith("starting")]
    assert starting == [f"starting {name}" for name in ("plain vLLM", "telltale", "telltale", "plain vLLM")]
    assert comparison.starts == len(ROUNDS)
    assert [one.plain_first for one in comparison.rounds] == [True, False]

    # The prefix of every burst was computed once in both servers, and every position was scored all the same.
    assert comparison.cache.prefix_caching
    assert comparison.shared_tokens == 15 * (500 // comparison.cache.block_size * comparison.cache.block_size) > 0
    assert comparison.computed_once
    for one in comparison.rounds:
        assert one.plain.burst_prompts.cached == one.telltale.burst_prompts.cached == comparison.shared_tokens
        assert one.plain.burst_prompts.computed == WORKLOAD.burst.prompt_tokens - comparison.shared_tokens
        assert len(one.telltale.burst.first_seconds) == WORKLOAD.burst.requests
    measured_positions = sum(
        sample.positions for one in comparison.rounds for sample in (one.telltale.steady, one.telltale.burst)
    )
    sent = 2 * measured_positions  # each start has a warm-up, which is like a round
    assert comparison.seen.scored + comparison.seen.skipped == sent
    assert comparison.seen.gaps == comparison.seen.acted == 0

    own, large = (line.footprint for line in measured.memory)
    assert (own.num_blocks, own.block_size) == (comparison.cache.num_blocks, comparison.cache.block_size)
    assert (own.taps, own.columns, own.max_rows) == (len(LAYERS), len(LAYERS) * 65, 2048)
    assert large.d_model == 8192

    setting = Setting("test", "tiny", flags, {}, describe(LAYERS), WORKLOAD, datetime.now(UTC), 1.0)
    report = Report(read_machine(), setting, comparison, measured.memory)
    require_sound(report)
    assert "in every burst, both servers computed the shared prefix once" in report.write(tmp_path)[1].read_text()
