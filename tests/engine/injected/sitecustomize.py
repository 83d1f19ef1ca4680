"""Runs at the start of every process of a server under test, and breaks it from inside when a file says so.

The folder ``TELLTALE_TEST_FAULTS`` holds the files: ``corrupt`` (while it is there, the weights on the device are not
the bank's), ``plain_worker`` (workers are vLLM's own). Nothing of the product knows of this.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("TELLTALE_TEST_FAULTS")
POLL_SECONDS = 0.05


def module(name: str, attribute: str) -> Any:
    """A module that some other thread imports, once it is whole."""
    while not hasattr(sys.modules.get(name), attribute):
        time.sleep(POLL_SECONDS)
    return sys.modules[name]


def corrupt(file: Path) -> None:
    taps = module("serving.engine.taps", "install_taps")
    made: list[Any] = []
    original = taps.TapSet.__init__

    def remember(self: Any, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    taps.TapSet.__init__ = remember
    is_corrupt = False
    while True:
        time.sleep(POLL_SECONDS)
        if file.exists() != is_corrupt:
            is_corrupt = not is_corrupt
            for tap_set in made:
                for layer in map(tap_set.module, tap_set.taps):
                    layer.telltale_weight[7, 0] += 0.5 if is_corrupt else -0.5


def plain_worker() -> None:
    worker = module("serving.engine.worker", "TelltaleCPUWorker")
    del worker.TelltaleCPUWorker.init_device
    del worker.WorkerStatus.telltale_status


if FOLDER:
    threading.Thread(target=corrupt, args=(Path(FOLDER) / "corrupt",), daemon=True).start()
    if (Path(FOLDER) / "plain_worker").exists():
        threading.Thread(target=plain_worker, daemon=True).start()
