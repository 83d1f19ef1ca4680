"""vLLM's V2 model runner on a CPU: its Triton kernels run in Triton's interpreter, slowly.

vLLM has V2 on a CPU where a Triton for CPUs is installed. Triton's own interpreter runs the same kernels on CPU
tensors; vLLM only asks for a backend named ``cpu``, which is put there before vLLM is imported. Everything else is what
runs on a GPU: vLLM's V2 runner, its worker glue, our adapter, the scheduler and the monitor.
"""

from __future__ import annotations

import os
from types import SimpleNamespace


def prepare() -> None:
    """Have every engine of this process use V2; before vLLM is imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise SystemExit("vLLM did not accept Triton's interpreter: nothing of V2 can run here.")
