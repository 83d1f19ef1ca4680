"""Alternating rounds: one server is measured while the other one is stopped, and the order changes each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import httpx

from serving.bench import BenchError
from serving.bench.cache import KVCache, PromptTokens, read_kv_cache, read_prompt_tokens
from serving.bench.coverage import Seen, read_seen, require_seen
from serving.bench.load import Sample, Workload, measure_burst, measure_steady
from serving.bench.servers import Server

_EMPTY = Seen(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Turn:
    """One server, once.

    Attributes:
        steady, burst: what was measured.
        burst_prompts: what became of the burst's prompt tokens, as vLLM counts them.
    """

    steady: Sample
    burst: Sample
    burst_prompts: PromptTokens


@dataclass(frozen=True, slots=True)
class Round:
    """Both servers, one after the other.

    Attributes:
        plain_first: the order.
        plain, telltale: what was measured.
    """

    plain_first: bool
    plain: Turn
    telltale: Turn


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the replies of one workload compare, with the warm-up.

    Attributes:
        replies: of Telltale, that were compared.
        differing: those of them that plain vLLM never gave to the same prompt.
        plain_variants: the largest number of different replies that plain vLLM itself gave to one prompt.
    """

    replies: int
    differing: int
    plain_variants: int

    def joined(self, other: Agreement) -> Agreement:
        """Both together; each was compared with the plain server of its own start."""
        return Agreement(
            self.replies + other.replies,
            self.differing + other.differing,
            max(self.plain_variants, other.plain_variants),
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rounds, and what was checked beside them.

    Attributes:
        rounds: in order, without the warm-ups.
        cache: the KV cache of each of the servers.
        shared_tokens: of a burst's prompts, that need not be computed if the prefix is computed once.
        seen: what the monitor counted, with the warm-up.
        steady, burst: how the replies compare.
        starts: how often both servers were started.
    """

    rounds: tuple[Round, ...]
    cache: KVCache
    shared_tokens: int
    seen: Seen
    steady: Agreement
    burst: Agreement
    starts: int = 1

    def joined(self, other: Comparison) -> Comparison:
        """This one, and then another of the same workload on servers that were started anew."""
        return Comparison(
            rounds=self.rounds + other.rounds,
            cache=require_same_cache([self.cache], other.cache),
            shared_tokens=self.shared_tokens,
            seen=self.seen.plus(other.seen),
            steady=self.steady.joined(other.steady),
            burst=self.burst.joined(other.burst),
            starts=self.starts + other.starts,
        )

    @property
    def computed_once(self) -> bool:
        """Whether both servers computed the prefix of every burst exactly once."""
        turns = [turn for one in self.rounds for turn in (one.plain, one.telltale)]
        return all(turn.burst_prompts.cached == self.shared_tokens for turn in turns)


class Bench:
    """Measures two servers. Both are stopped when it is handed them, and after each measurement.

    Args:
        plain: vLLM as it is.
        telltale: the monitored one.
        model: name under which both serve.
        workload: one turn.
        vocabulary: size of the model's.
    """

    def __init__(self, plain: Server, telltale: Server, *, model: str, workload: Workload, vocabulary: int) -> None:
        self._plain = plain
        self._telltale = telltale
        self._model = model
        self._workload = workload
        self._vocabulary = vocabulary
        self._seen: Seen | None = None
        self._start = _EMPTY
        self._caches: dict[str, KVCache] = {}

    def run(self, rounds: int, *, progress: Callable[[str], None], before: int = 0) -> Comparison:
        """Warm up, then measure.

        Args:
            rounds: how many are measured.
            progress: told of each round.
            before: how many were measured on servers that were started before: numbers and order go on from there.
        Raises:
            BenchError: a server failed, prompts were not computed anew, or the monitor did not see everything.
        """
        warm = self._round(before, plain_first=True)
        progress(
            f"warmed up; on plain vLLM a throughput phase takes {warm.plain.steady.seconds:.1f} s, a burst "
            f"{warm.plain.burst.seconds:.1f} s"
        )
        done = []
        for number in range(before + 1, before + rounds + 1):
            one = self._round(number, plain_first=number % 2 == 1)
            done.append(one)
            progress(f"round {number}: {_ratios(one)}")
        return self._compare(warm, done)

    def _compare(self, warm: Round, rounds: Sequence[Round]) -> Comparison:
        all_rounds = (warm, *rounds)
        cache = self._cache_of(self._plain)
        return Comparison(
            rounds=tuple(rounds),
            cache=cache,
            shared_tokens=self._workload.burst.shared_tokens(cache.block_size),
            seen=(self._seen or _EMPTY).since(self._start),
            steady=agreement([one.plain.steady for one in all_rounds], [one.telltale.steady for one in all_rounds]),
            burst=agreement([one.plain.burst for one in all_rounds], [one.telltale.burst for one in all_rounds]),
        )

    def _round(self, number: int, *, plain_first: bool) -> Round:
        if plain_first:
            plain, telltale = self._turn(self._plain, number), self._turn(self._telltale, number)
        else:
            telltale, plain = self._turn(self._telltale, number), self._turn(self._plain, number)
        return Round(plain_first, plain, telltale)

    def _turn(self, server: Server, number: int) -> Turn:
        server.resume()
        try:
            turn = self._load(server, number)
        except httpx.HTTPError as error:
            raise server.failure(f"did not answer ({type(error).__name__}: {error})") from error
        except BenchError as error:
            raise BenchError(f"{server.name}: {error}") from error
        server.pause()
        return turn

    def _load(self, server: Server, number: int) -> Turn:
        cache = self._cache_of(server)
        if server is self._telltale and self._seen is None:
            self._start = self._seen = read_seen(server.url) or _EMPTY
        cold = read_prompt_tokens(server.url)
        steady = measure_steady(
            server.url, self._model, self._workload, salt=f"round-{number}", vocabulary=self._vocabulary
        )
        self._require_seen(server, steady)
        before = read_prompt_tokens(server.url)
        require_cached(before.since(cold), at_most=0, what="the steady load")
        burst = measure_burst(server.url, self._model, self._workload, number, vocabulary=self._vocabulary)
        self._require_seen(server, burst)
        prompts = read_prompt_tokens(server.url).since(before)
        require_cached(prompts, at_most=self._workload.burst.shared_tokens(cache.block_size), what="a burst")
        return Turn(steady, burst, prompts)

    def _require_seen(self, server: Server, sample: Sample) -> None:
        if server is self._telltale:
            before = self._seen or _EMPTY
            self._seen = require_seen(server.url, before, requests=sample.requests, positions=sample.positions)

    def _cache_of(self, server: Server) -> KVCache:
        """Read once from each server, and the same for both."""
        if server.name not in self._caches:
            self._caches[server.name] = require_same_cache(self._caches.values(), read_kv_cache(server.url))
        return self._caches[server.name]


def agreement(plain: Sequence[Sample], telltale: Sequence[Sample]) -> Agreement:
    """Compare replies prompt by prompt, over all rounds.

    Args:
        plain: what plain vLLM gave; at least one reply to every prompt.
        telltale: what Telltale gave.
    """
    known: dict[str, set[tuple[int, ...]]] = {}
    for reply in (reply for sample in plain for reply in sample.replies):
        known.setdefault(reply.prompt, set()).add(reply.tokens)
    ours = [reply for sample in telltale for reply in sample.replies]
    return Agreement(
        replies=len(ours),
        differing=sum(reply.tokens not in known[reply.prompt] for reply in ours),
        plain_variants=max(len(variants) for variants in known.values()),
    )


def require_same_cache(known: Iterable[KVCache], found: KVCache) -> KVCache:
    """Check that a server caches prefixes, and has the same cache as the other one.

    Returns: the cache.

    Raises:
        BenchError: it has not.
    """
    if not found.prefix_caching:
        raise BenchError("prefix caching is off: a burst would compute its prefix for every request.")
    for other in known:
        if found != other:
            raise BenchError(f"its KV cache is {found}, the other server's {other}: there is nothing to compare.")
    return found


def require_cached(prompts: PromptTokens, *, at_most: int, what: str) -> None:
    """Check that prompts were computed anew, but for what requests of the same burst share.

    Raises:
        BenchError: more came out of the prefix cache.
    """
    if prompts.cached > at_most:
        raise BenchError(
            f"{prompts.cached} prompt tokens of {what} came out of the prefix cache; {at_most} can if nothing of it "
            "was sent before. Times with a warm cache are not what is measured here."
        )


def _ratios(one: Round) -> str:
    pairs = (("steady", one.telltale.steady, one.plain.steady), ("burst", one.telltale.burst, one.plain.burst))
    return "; ".join(
        f"{name}: throughput x{ours.throughput / plain.throughput:.3f}, "
        f"TTFT x{ours.ttft_seconds / plain.ttft_seconds:.3f}"
        for name, ours, plain in pairs
    )


def require_unmonitored(server: Server) -> None:
    """Check that the plain server is plain.

    Raises:
        BenchError: it is monitored.
    """
    if read_seen(server.url) is not None:
        raise BenchError(
            f"{server.name} exports telltale metrics: it is monitored too, and there is nothing to compare."
        )
