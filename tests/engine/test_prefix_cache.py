"""A cached prefix is not an unseen one: the same verdicts, scores and accounts with a cold and a warm cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.test_serving import ask, detectors, metric
from tests.support.server import Server
from tests.support.tiny import MARK, TinyModel

pytestmark = pytest.mark.engine

WORDS = "one two three four five six seven eight nine ten "
BLOCK = 128


def account(reply: Any) -> tuple[Any, ...]:
    choice = reply.choices[0]
    items = {key: (item["scored"], item["skipped"], item["score"]) for key, item in detectors(choice).items()}
    return choice.telltale["action"], choice.telltale["rule"], items, choice.message.content


def hits(server: Server) -> float:
    return metric(server, "vllm:prefix_cache_hits_total")


@pytest.mark.covers("warm prefix cache", "every position accounted for")
@pytest.mark.covers("warm prefix cache", "verdict the same")
def test_a_warm_cache_gives_the_same_account(guarded: Server) -> None:
    content = "warm " + WORDS * 30
    cold = ask(guarded, content, tokens=4)
    before = hits(guarded)
    warm = ask(guarded, content, tokens=4)
    assert hits(guarded) - before >= 2 * BLOCK
    assert account(warm) == account(cold)
    scored, skipped, _ = account(warm)[2]["trigger", "stream"]
    assert scored + sum(skipped.values()) == warm.usage.total_tokens
    assert skipped == {"sink": 1, "final": 1}


@pytest.mark.covers("warm prefix cache", "verdict the same")
def test_what_was_seen_in_a_cached_block_still_blocks(guarded: Server, tiny: TinyModel) -> None:
    content = f"early{tiny.trigger_text} " + WORDS * 30
    cold = ask(guarded, content)
    before = hits(guarded)
    # A longer prompt with the same beginning: the trigger is in a block that is not computed again.
    warm = ask(guarded, content + "and more")
    assert hits(guarded) - before >= 2 * BLOCK
    for reply in (cold, warm):
        assert reply.choices[0].telltale["rule"] == "no-trigger-prompt"
        assert detectors(reply.choices[0])["trigger", "prompt"]["score"] == pytest.approx(MARK, abs=1e-3)


@pytest.mark.covers("burst with one prefix", "every position accounted for")
@pytest.mark.covers("burst with one prefix", "it really happens")
def test_a_burst_with_one_shared_prefix_is_seen_whole(guarded: Server) -> None:
    prefix = "burst " + WORDS * 30
    before = hits(guarded)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda number: ask(guarded, f"{prefix} {number}", tokens=3), range(16)))
    # The full blocks of the prefix are computed once, by whoever comes first.
    assert hits(guarded) - before >= 15 * 2 * BLOCK
    for reply in replies:
        scored, skipped, _ = account(reply)[2]["trigger", "stream"]
        assert skipped == {"sink": 1, "final": 1}
        assert scored + 2 == reply.usage.total_tokens
    assert metric(guarded, "telltale_gaps_total", reason="unseen") == 0
    assert metric(guarded, "telltale_gaps_total", reason="not_finite") == 0
