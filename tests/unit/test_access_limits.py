"""What a request may be, and how many a key may send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from starlette.types import Message

from monitor.access import Access, KeyScope
from serving.api.keyring import Holder, KeyRing, digest_of
from serving.api.limits import Buckets, TooLargeError, read_body, retry_after
from tests.unit.access_client import CHAT, OPEN_RING, bearer, make_client


class TestBodies:
    ACCESS = Access(body_bytes=2048)

    def test_up_to_the_limit_a_body_arrives_whole(self) -> None:
        client = make_client(self.ACCESS)
        for size in (0, 1, 2048):
            assert client.post(CHAT, headers=bearer("sender"), content=b"x" * size).json() == {"body": size}

    @pytest.mark.parametrize("chunked", [False, True])
    def test_above_it_is_refused(self, chunked: bool) -> None:
        def parts() -> Iterator[bytes]:
            for _ in range(3):
                yield b"x" * 1024

        content: Any = parts() if chunked else b"x" * 2049
        answer = make_client(self.ACCESS).post(CHAT, headers=bearer("sender"), content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    def test_who_has_no_key_is_not_read(self) -> None:
        answer = make_client(self.ACCESS).post(CHAT, content=b"x" * 4096)
        assert answer.status_code == 401

    @settings(max_examples=50, deadline=None)
    @given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), limit=st.integers(0, 200))
    def test_what_is_replayed_is_what_came_and_no_more_is_read_than_must_be(self, sizes: list[int], limit: int) -> None:
        read: list[int] = []

        async def receive() -> Message:
            number = len(read)
            read.append(sizes[number])
            return {"type": "http.request", "body": b"x" * sizes[number], "more_body": number + 1 < len(sizes)}

        async def run() -> list[int]:
            replay = await read_body(receive, limit)
            return [len((await replay())["body"]) for _ in sizes]

        if sum(sizes) <= limit:
            assert asyncio.run(run()) == sizes
        else:
            with pytest.raises(TooLargeError):
                asyncio.run(run())
            assert sum(read[:-1]) <= limit < sum(read)

    async def test_a_body_that_never_ends_is_given_up(self) -> None:
        async def drip() -> AsyncIterator[Message]:
            while True:
                await asyncio.sleep(0.01)
                yield {"type": "http.request", "body": b"", "more_body": True}

        with pytest.raises(TimeoutError):
            await read_body(drip().__anext__, 100, patience=0.1)

    def test_where_no_key_is_asked_for_no_long_body_is_kept(self) -> None:
        client = make_client()
        assert client.post("/ping", content=b"x" * 1024).status_code == 200
        assert client.post("/ping", content=b"x" * 1025).status_code == 413

    def test_headers_have_a_limit_too(self) -> None:
        client = make_client(Access(header_bytes=1024))
        for headers, status in (({"x-a": "y" * 300}, 200), ({"x-a": "y" * 1024}, 431), ({"y" * 1024: "a"}, 431)):
            assert client.get("/health", headers=headers).status_code == status


class TestRates:
    def test_a_key_gets_what_it_may_and_no_other_pays(self) -> None:
        ring = KeyRing([
            Holder(digest_of("slow"), frozenset({KeyScope.INFER}), 2),
            Holder(digest_of("usual"), frozenset({KeyScope.INFER})),
        ])  # fmt: skip
        client = make_client(Access(requests_per_minute=4), ring)

        def send(key: str) -> Any:
            return client.post(CHAT, headers={"authorization": f"Bearer {key}"})

        assert [send("slow").status_code for _ in range(4)] == [200, 200, 429, 429]
        answer = send("slow")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert [send("usual").status_code for _ in range(5)] == [200] * 4 + [429]
        assert send("nobody").status_code == 401
        assert client.get("/health").status_code == 200

    def test_all_without_a_key_share_one_bucket(self) -> None:
        client = make_client(Access(requests_per_minute=3), OPEN_RING)
        keys = [f"Bearer made-up-{number}" for number in range(4)]
        assert [client.post(CHAT, headers={"authorization": key}).status_code for key in keys] == [200] * 3 + [429]

    @settings(max_examples=60, deadline=None)
    @given(gaps=st.lists(st.floats(0, 30), max_size=60), per_minute=st.integers(1, 30))
    def test_no_more_passes_than_a_burst_and_the_rate(self, gaps: list[float], per_minute: int) -> None:
        now = 0.0
        buckets = Buckets(lambda: now)
        passed: list[float] = []
        for gap in gaps:
            now += gap
            wait = buckets.take("key", per_minute)
            if wait == 0.0:
                passed.append(now)
            else:
                then, now = now, now + wait + 1e-6
                assert buckets.take("key", per_minute) == 0.0, "what it said was too short"
                passed.append(now)
                assert then < now
        for first, start in enumerate(passed):
            for last, end in enumerate(passed[first:], 1):
                assert last <= per_minute + (end - start) * per_minute / 60 + 1e-3

    def test_a_key_that_is_no_longer_known_leaves_nothing(self) -> None:
        buckets = Buckets(lambda: 0.0)
        assert [buckets.take("key", 1) > 0 for _ in range(2)] == [False, True]
        buckets.keep(["other"])
        assert buckets.take("key", 1) == 0.0

    def test_retry_after_is_whole_and_never_zero(self) -> None:
        assert [retry_after(seconds) for seconds in (0.01, 1.0, 1.2)] == ["1", "1", "2"]
