"""Readouts beside vLLM's own block manager: what is written late is written as if it had been written at once."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from serving.engine.prefix import PrefixReadouts, whole_group
from serving.engine.readouts import WorkerReadouts

SIZE = 4
WIDTH = 3


class Beside:
    """A manager of a few blocks, the readouts beside it, and a clock of steps."""

    def __init__(self, num_blocks: int = 5) -> None:
        spec = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(SIZE, sha256)
        self.manager = KVCacheManager(
            config, max_model_len=64, scheduler_block_size=SIZE, hash_block_size=SIZE, enable_caching=True
        )
        bank = SimpleNamespace(width=WIDTH, entries=lambda: tuple((column, "direction") for column in range(WIDTH)))
        self.prefix = PrefixReadouts(self.manager, whole_group(self.manager), bank, margin=0)
        self.requests: dict[str, Request] = {}

    def begin(self, name: str, tokens: Sequence[int]) -> int:
        """How many tokens the cache gives it."""
        request = Request(name, list(tokens), SamplingParams(max_tokens=1), None, block_hasher=self.hasher)
        self.requests[name] = request
        hit, computed = self.manager.get_computed_blocks(request)[:2]
        allowed = self.prefix.allow(name, hit, computed) if computed else 0
        self.manager.allocate_slots(
            request, len(tokens) - allowed, allowed, self.manager.truncate_computed_blocks(hit, allowed)
        )
        request.num_computed_tokens = len(tokens)
        return allowed

    def schedule(self, **counts: int) -> SimpleNamespace:
        step = SimpleNamespace(num_scheduled_tokens=counts)
        self.prefix.scheduled(step, self.requests)
        return step

    def rows(self, step: SimpleNamespace, value: float) -> WorkerReadouts:
        counts = step.num_scheduled_tokens
        positions = np.concatenate(
            [np.arange(count) + self.requests[name].num_computed_tokens - count for name, count in counts.items()]
        )
        readouts = np.full((len(positions), WIDTH), value, dtype=np.float32)
        return WorkerReadouts(list(counts), np.array(list(counts.values())), positions, readouts)

    def end(self, name: str) -> None:
        self.manager.free(self.requests.pop(name))
        self.prefix.forget(name)


def test_a_cached_prefix_is_replayed_with_what_its_step_had_read() -> None:
    beside = Beside()
    beside.begin("first", range(9))
    step = beside.schedule(first=9)
    beside.prefix.file(step, beside.rows(step, 1.0))
    assert beside.begin("second", range(9)) == 8
    assert beside.prefix.replayable(["second", "other"]) == ["second"]
    np.testing.assert_array_equal(beside.prefix.take_replay("second", before=8), np.ones((8, WIDTH)))
    assert beside.prefix.replayable(["second"]) == []


@pytest.mark.covers("cached block without readouts", "noticed")
def test_a_prefix_whose_step_is_under_way_is_not_replayed_ahead_of_it() -> None:
    beside = Beside()
    beside.begin("first", range(9))
    assert beside.begin("second", range(9)) == 8
    step = beside.schedule(first=9, second=1)
    assert beside.prefix.replayable(["second"]) == []
    beside.prefix.file(step, beside.rows(step, 2.0))
    np.testing.assert_array_equal(beside.prefix.take_replay("second", before=8), np.full((8, WIDTH), 2.0))


@pytest.mark.covers("cached block without readouts", "noticed")
def test_rows_that_were_not_written_yet_do_not_reach_a_block_that_was_handed_out_anew() -> None:
    beside = Beside(num_blocks=4)
    beside.begin("first", range(9))
    step = beside.schedule(first=9)
    beside.prefix.file(step, beside.rows(step, 1.0))
    beside.end("first")
    # All blocks there are: those of the first request begin a new life before its rows were written.
    assert beside.begin("second", range(100, 109)) == 0
    assert beside.begin("third", range(100, 109)) == 8
    assert beside.prefix.replayable(["third"]) == []
    assert np.isnan(beside.prefix.take_replay("third", before=8)).all()


def misfits(found: WorkerReadouts) -> list[WorkerReadouts]:
    ids, counts, positions, readouts = found.request_ids, found.counts, found.positions, found.readouts
    return [
        WorkerReadouts(ids, counts, positions, readouts[:, :-1]),
        WorkerReadouts(ids, counts, positions, readouts[:-1]),
        WorkerReadouts(ids, counts - 1, positions, readouts),
        WorkerReadouts(ids, np.array([10, -1]), positions, readouts),
        WorkerReadouts(["first", "more"], counts, positions, readouts),
    ]


@pytest.mark.covers("cached block without readouts", "kept out")
@pytest.mark.parametrize("number", range(5))
def test_rows_that_do_not_fit_are_refused_at_once_and_nobody_may_rest_on_them(number: int) -> None:
    beside = Beside()
    beside.begin("first", range(9))
    step = beside.schedule(first=9)
    with pytest.raises(ValueError, match=r"were expected|do not make 9 rows"):
        beside.prefix.file(step, misfits(beside.rows(step, 1.0))[number])
    assert beside.begin("second", range(9)) == 0


@pytest.mark.covers("cached block without readouts", "kept out")
@pytest.mark.parametrize("how", ["step", "all"])
def test_a_loss_also_takes_what_was_not_written_yet(how: str) -> None:
    beside = Beside()
    beside.begin("first", range(9))
    step = beside.schedule(first=9)
    beside.prefix.file(step, beside.rows(step, 1.0))
    if how == "all":
        beside.prefix.lose_all()
    else:
        again = beside.schedule(first=9)
        beside.prefix.file(again, None)
    assert beside.begin("second", range(9)) == 0
