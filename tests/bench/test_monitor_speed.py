"""How long the monitor holds up a step of the scheduler: ``make bench-monitor``, on an idle machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monitor.policy import Plan
from tests.bench.monitored_load import Load, make_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def plan_with_ends(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("plan"), ends=4)


@pytest.mark.parametrize(
    ("watched", "described"),
    [("plan", 0), ("plan", 256), ("plan_with_ends", 256)],
    ids=["no_stop_strings", "all_with_stop_strings", "stop_strings_and_ends_watched"],
)
def test_256_requests_decode_one_token(
    benchmark: Any, request: pytest.FixtureRequest, watched: str, described: int
) -> None:
    load = Load(request.getfixturevalue(watched), 256)

    def prepared() -> tuple[tuple[Any, ...], dict[str, Any]]:
        sent = load.sent(load.names, load.position, 1)
        load.position += 1
        return (sent, load.names[:described]), {}

    benchmark.pedantic(load.step, setup=prepared, rounds=2000, warmup_rounds=100)
    benchmark.extra_info["report_bytes"] = load.step(*prepared()[0])


def test_ten_more_rules_join_verdicts(benchmark: Any, tmp_path: Path) -> None:
    load = Load(make_plan(tmp_path, joined=10), 256)

    def prepared() -> tuple[tuple[Any, ...], dict[str, Any]]:
        sent = load.sent(load.names, load.position, 1)
        load.position += 1
        return (sent, []), {}

    benchmark.pedantic(load.step, setup=prepared, rounds=2000, warmup_rounds=100)


@pytest.mark.parametrize("prompts", [1, 8])
def test_a_prefill_of_2048_rows(benchmark: Any, plan: Plan, prompts: int) -> None:
    load, rows = Load(plan, 32), 2048 // prompts
    live: list[str] = []
    number = 0

    def prepared() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal live, number
        for name in live:
            load.monitor.finish(name, num_positions=rows, sampled=0, aborted=True)
        live = [f"p{number}-{place}" for place in range(prompts)]
        number += 1
        for name in live:
            load.admit(name, rows)
        return (load.sent(live, 0, rows), live), {}

    benchmark.pedantic(load.step, setup=prepared, rounds=200, warmup_rounds=10)
