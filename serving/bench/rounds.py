"""Alternating rounds: one server is measured while the other one is stopped, and the order changes each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from serving.bench import BenchError
from serving.bench.coverage import Seen, read_seen, require_seen
from serving.bench.load import Sample, Workload, measure
from serving.bench.servers import Server

_EMPTY = Seen(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Round:
    """Both servers, one after the other.

    Attributes:
        plain_first: the order.
        plain, telltale: what was measured.
    """

    plain_first: bool
    plain: Sample
    telltale: Sample


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rounds, and what was checked beside them.

    Attributes:
        rounds: in order, without the warm-up.
        seen: what the monitor counted, with the warm-up.
        replies: of Telltale, that were compared, with the warm-up.
        differing: those of them that plain vLLM never gave to the same prompt.
        plain_variants: the largest number of different replies that plain vLLM itself gave to one prompt.
    """

    rounds: tuple[Round, ...]
    seen: Seen
    replies: int
    differing: int
    plain_variants: int


class Bench:
    """Measures two servers. Both are stopped when it is handed them, and after each measurement.

    Args:
        plain: vLLM as it is.
        telltale: the monitored one.
        model: name under which both serve.
        workload: one round.
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

    def run(self, rounds: int, *, progress: Callable[[str], None]) -> Comparison:
        """Warm up, then measure.

        Args:
            rounds: how many are measured.
            progress: told of each round.
        Raises:
            BenchError: a server failed, or the monitor did not see everything.
        """
        warm = self._round(plain_first=True)
        progress(f"warmed up; a throughput phase takes {warm.plain.seconds:.1f} s on plain vLLM")
        done = []
        for number in range(rounds):
            one = self._round(plain_first=number % 2 == 0)
            done.append(one)
            progress(
                f"round {number + 1}/{rounds}: throughput x{one.telltale.throughput / one.plain.throughput:.3f}, "
                f"TTFT x{one.telltale.ttft_seconds / one.plain.ttft_seconds:.3f}"
            )
        return self._compare(warm, done)

    def _compare(self, warm: Round, rounds: Sequence[Round]) -> Comparison:
        known: dict[int, set[tuple[int, ...]]] = {}
        for one in (warm, *rounds):
            for reply in one.plain.replies:
                known.setdefault(reply.prompt, set()).add(reply.tokens)
        ours = [reply for one in (warm, *rounds) for reply in one.telltale.replies]
        return Comparison(
            rounds=tuple(rounds),
            seen=(self._seen or _EMPTY).since(self._start),
            replies=len(ours),
            differing=sum(reply.tokens not in known[reply.prompt] for reply in ours),
            plain_variants=max(len(variants) for variants in known.values()),
        )

    def _round(self, *, plain_first: bool) -> Round:
        if plain_first:
            plain, telltale = self._measure_plain(), self._measure_telltale()
        else:
            telltale, plain = self._measure_telltale(), self._measure_plain()
        return Round(plain_first, plain, telltale)

    def _measure_plain(self) -> Sample:
        return self._awake(self._plain, lambda: self._load(self._plain))

    def _measure_telltale(self) -> Sample:
        def load_and_check() -> Sample:
            url = self._telltale.url
            if self._seen is None:
                self._start = self._seen = read_seen(url) or _EMPTY
            sample = self._load(self._telltale)
            self._seen = require_seen(url, self._seen, requests=sample.requests, positions=sample.positions)
            return sample

        return self._awake(self._telltale, load_and_check)

    def _load(self, server: Server) -> Sample:
        return measure(server.url, self._model, self._workload, vocabulary=self._vocabulary)

    @staticmethod
    def _awake(server: Server, work: Callable[[], Sample]) -> Sample:
        server.resume()
        try:
            sample = work()
        except httpx.HTTPError as error:
            raise server.failure(f"did not answer ({type(error).__name__}: {error})") from error
        except BenchError as error:
            raise BenchError(f"{server.name}: {error}") from error
        server.pause()
        return sample


def require_unmonitored(server: Server) -> None:
    """Check that the plain server is plain.

    Raises:
        BenchError: it is monitored.
    """
    if read_seen(server.url) is not None:
        raise BenchError(
            f"{server.name} exports telltale metrics: it is monitored too, and there is nothing to compare."
        )
