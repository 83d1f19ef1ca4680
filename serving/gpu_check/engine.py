"""Second tier: a monitored engine. Every row, against transformers; graphs; batch mates; throughput."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from probes.bank import Bank
from probes.modelref import read_model_ref
from serving.bench.detectors import write_monitored
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from serving.deployment import deploy
from serving.gpu_check import GpuCheckError
from serving.gpu_check.parity import Agreement, Reference, agreement, drift
from serving.gpu_check.result import Checks

DIRECTIONS = 16
NEW_TOKENS = 12
_LOG_LINES = 40
_START_SECONDS = 1500
_LOWEST_TOKEN = 100
"""Ids below it are markers in most vocabularies."""
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@dataclass(frozen=True, slots=True)
class Setting:
    """What an engine is run with.

    Attributes:
        name: of its checks.
        runner: class of the model runner that must run.
        environment: beside this process's own.
        engine: arguments of ``vllm.LLM``.
        lengths: of the prompts, in tokens.
        modes: of CUDA graphs, each of which must be seen.
    """

    name: str
    runner: str
    environment: Mapping[str, str]
    engine: Mapping[str, Any]
    lengths: tuple[int, ...]
    modes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Model:
    folder: Path
    name: str
    vocabulary: int


def settings_of(device: torch.device, *, eager: bool) -> tuple[Setting, ...]:
    """The engines to run on a device: on CUDA both of vLLM's runners, V2 first."""
    common = {"enable_prefix_caching": False, "max_num_seqs": 16, "cudagraph_metrics": True, "seed": 0}
    if device.type != "cuda":
        engine = {**common, "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}
        engine |= {"max_model_len": 512, "max_num_batched_tokens": 64}
        return (Setting("v1", "TappedCPUModelRunner", {_RUNNER: "0"}, engine, (5, 40, 150), frozenset()),)
    engine = {**common, "dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.5}
    engine |= {"max_model_len": 2048, "max_num_batched_tokens": 1024}
    if eager:
        engine["enforce_eager"] = True
    else:
        engine["compilation_config"] = {"cudagraph_mode": "FULL_AND_PIECEWISE"}
    # The last prompt is larger than the largest graph: it runs compiled, outside of any.
    lengths, modes = (5, 40, 150, 1400), frozenset() if eager else frozenset({"FULL", "PIECEWISE", "NONE"})
    return (
        Setting("v2", "TappedV2Runner", {_RUNNER: "1"}, engine, lengths, modes),
        Setting("v1", "TappedGPUModelRunner", {_RUNNER: "0"}, engine, lengths, modes),
    )


def check_engine(
    checks: Checks,
    device: torch.device,
    *,
    model: str | None,
    rounds: int,
    eager: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """All checks of the engine. A setting whose engine does not start is one failed check; the next one is tried.

    Args:
        checks: taken down there.
        device: ``cuda`` or ``cpu``.
        model: a folder, or None for the embedded model.
        rounds: of the throughput comparison; 0 leaves it out.
        eager: without compilation and graphs.
        progress: told what is going on.
    Returns: figures for the report.
    Raises:
        GpuCheckError: the folder of the model is not one.
    """
    folder = Path(model) if model else ensure_builtin_model(DEFAULT_MODEL, progress=progress).path
    if not (folder / "config.json").is_file():
        raise GpuCheckError(f"--model {folder}: a folder with a config.json is needed. Download the model first.")
    vocabulary = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    served = _Model(folder, folder.name if model else DEFAULT_MODEL, vocabulary)
    figures: dict[str, Any] = {"model": served.name}
    with tempfile.TemporaryDirectory(prefix="telltale-gpu-check-") as work:
        for setting in settings_of(device, eager=eager):
            progress(f"engine {setting.name}: starting; this takes minutes where graphs are captured")
            checks.guard(
                f"engine.{setting.name}",
                lambda setting=setting: figures.update(  # type: ignore[misc]
                    _check_setting(checks, setting, device, served, Path(work) / setting.name)
                ),
                OSError,
                KeyError,
                subprocess.SubprocessError,
            )
            if device.type == "cuda":
                # What transformers used: the next engine asks for its share of the device before it starts.
                torch.cuda.empty_cache()
        if rounds > 0:
            from serving.gpu_check.throughput import check_throughput

            checks.guard(
                "engine.throughput",
                lambda: figures.update(
                    check_throughput(
                        checks,
                        device,
                        folder,
                        served.name,
                        work=Path(work),
                        rounds=rounds,
                        eager=eager,
                        progress=progress,
                    )
                ),
                OSError,
            )
        else:
            checks.skip("engine.throughput", "left out with --rounds 0")
    return figures


def _check_setting(checks: Checks, setting: Setting, device: torch.device, model: _Model, work: Path) -> dict[str, Any]:
    work.mkdir()
    dtype = str(setting.engine["dtype"])
    reference = read_model_ref(model.folder, model_id=model.name, dtype=dtype)
    layers = sorted({reference.num_layers // 4, reference.num_layers // 2, reference.num_layers - 1})
    policy = write_monitored(work, reference, model_id=model.name, layers=layers, directions=DIRECTIONS)
    bank = deploy(policy, model_dir=model.folder, model_id=model.name, dtype=dtype).plan.bank
    runs = _runs(setting.lengths, model.vocabulary)
    captured = _run_engine(setting, model.folder, policy, runs, work)
    summary = json.loads(str(captured["summary"]))
    _Judge(checks, setting, bank, runs, captured).judge(
        summary, Reference(model.folder, bank, dtype=dtype, device=device)
    )
    modes: Counter[str] = Counter()
    for one in summary:
        modes.update(one["modes"])
    return {f"{setting.name} steps by graph mode": dict(modes)}


def _runs(lengths: Sequence[int], vocabulary: int) -> list[list[list[int]]]:
    """Every prompt alone; all together; all together with every mate of the first replaced, lengths kept."""
    rng = np.random.default_rng(11)
    prompts, others = (
        [rng.integers(_LOWEST_TOKEN, vocabulary, size=length).tolist() for length in lengths] for _ in range(2)
    )
    return [*([prompt] for prompt in prompts), prompts, [prompts[0], *others[1:]]]


def _run_engine(
    setting: Setting, folder: Path, policy: Path, runs: list[list[list[int]]], work: Path
) -> Mapping[str, npt.NDArray[Any]]:
    order = {
        "policy": str(policy),
        "engine": {"model": str(folder), **setting.engine},
        "runs": runs,
        "new_tokens": NEW_TOKENS,
    }
    log, out = work / "engine.log", work / "rows.npz"
    with log.open("wb") as output:
        done = subprocess.run(  # noqa: S603 - our own command line
            [sys.executable, "-m", "serving.engine.readings", str(out)],
            input=json.dumps(order).encode(),
            env={**os.environ, **setting.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_START_SECONDS,
            check=False,
        )
    if done.returncode != 0 or not out.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise GpuCheckError(f"the engine ended with status {done.returncode}; the end of its log: " + " / ".join(lines))
    with np.load(out) as saved:
        return dict(saved)


class _Judge:
    """Judges what an engine sent.

    Args:
        checks: taken down there.
        setting: of the engine.
        bank: what it read.
        runs: what it was asked.
        captured: what ``serving.engine.readings`` wrote.
    """

    def __init__(
        self,
        checks: Checks,
        setting: Setting,
        bank: Bank,
        runs: Sequence[Sequence[Sequence[int]]],
        captured: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self._checks = checks
        self._setting = setting
        self._bank = bank
        self._runs = runs
        self._captured = captured

    def judge(self, summary: Sequence[Mapping[str, Any]], reference: Reference) -> None:
        """Make all checks."""
        found = {one["runner"] for one in summary}
        self._require("runner", found == {self._setting.runner}, f"{', '.join(found)} ran")
        self._fired(summary)
        self._modes({mode for one in summary for mode in one["modes"]})
        self._positions()
        self._mates(self._parity(reference))

    def _require(self, name: str, passed: bool, detail: str) -> None:
        self._checks.require(f"engine.{self._setting.name}.{name}", passed, detail)

    def _fired(self, summary: Sequence[Mapping[str, Any]]) -> None:
        taps = sorted(str(tap) for tap in self._bank.taps)
        wrong = [
            f"run {number}: {one['fired']} in {sum(one['modes'].values())} steps"
            for number, one in enumerate(summary)
            if sorted(one["fired"]) != taps or set(one["fired"].values()) != {sum(one["modes"].values())}
        ]
        steps = sum(sum(one["modes"].values()) for one in summary)
        detail = "; ".join(wrong) or f"each of {len(taps)} taps fired once in each of {steps} steps"
        self._require("fired", not wrong and steps > 0, detail)

    def _modes(self, seen: set[str]) -> None:
        if not self._setting.modes:
            self._checks.skip(f"engine.{self._setting.name}.modes", "no CUDA graphs here")
            return
        missing = ", ".join(sorted(self._setting.modes - seen))
        detail = f"steps ran in the graph modes {', '.join(sorted(seen))}" + (f"; none in {missing}" if missing else "")
        self._require("modes", not missing, detail)

    def _positions(self) -> None:
        keys = [key for key in self._captured if key.endswith(".positions")]
        wrong = [
            key.removesuffix(".positions")
            for key in keys
            # The last sampled token is never fed back.
            if self._captured[key].tolist() != list(range(len(self._captured[key.replace("positions", "tokens")]) - 1))
        ]
        rows = sum(len(self._captured[key]) for key in keys)
        detail = f"wrong in {', '.join(wrong)}" if wrong else f"{rows} rows of {len(keys)} texts, each position once"
        self._require("positions", not wrong and rows > 0, detail)

    def _parity(self, reference: Reference) -> float:
        """Compare with transformers; returns the largest distance of a row that is allowed."""
        texts: list[Agreement] = []
        for key in [key for key in self._captured if key.endswith(".readouts")]:
            exact, same_dtype = reference.readouts(self._captured[key.replace("readouts", "tokens")][:-1])
            texts.append(agreement(self._bank, self._captured[key], exact=exact, same_dtype=same_dtype))
        for title, pick in (("rows", "row"), ("sink", "sink"), ("norms", "norm")):
            pairs = [(getattr(one, pick), getattr(one, f"{pick}_allowed")) for one in texts]
            found, allowed = max(pairs, key=lambda pair: pair[0] / pair[1])
            self._require(
                f"parity.{title}",
                found <= allowed,
                f"{found:.1e} off transformers in float32 at worst; {allowed:.1e} is allowed there: four times what "
                "transformers itself is off in the engine's dtype, and no less than float32's own error",
            )
        shifted, allowed = min(one.shifted for one in texts), max(one.row_allowed for one in texts)
        detail = f"rows shifted by one position would be {shifted:.1e} off, at most {allowed:.1e} is allowed"
        self._require("parity.can_fail", shifted > 2 * allowed, detail)
        return allowed

    def _mates(self, allowed: float) -> None:
        """The first prompt, with one set of batch mates and with another of the same lengths."""
        first, second = len(self._runs) - 2, len(self._runs) - 1
        tokens = [self._captured[f"{run}.0.tokens"] for run in (first, second)]
        # The row of a token is the same as long as all tokens up to it are.
        same = int(np.argmin(np.append(tokens[0] == tokens[1], False)))
        one, other = (self._captured[f"{run}.0.readouts"][:same] for run in (first, second))
        distance = drift(self._bank, one, other)
        self._require(
            "mates",
            same >= len(self._runs[first][0]) and distance <= allowed,
            f"with all mates replaced, {len(one)} rows moved by at most {distance:.1e} "
            f"(bit for bit the same: {np.array_equal(one, other)})",
        )
