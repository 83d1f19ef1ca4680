"""The way into vLLM: an entry point that puts our worker, scheduler and front end in place, or stops the process.

vLLM only logs when a plug-in fails. For a monitor that would mean a server that looks well and sees nothing, so every
failure here ends the process.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import structlog

import serving
from probes.errors import TelltaleError
from serving.engine import compat
from serving.engine.capture import CAPTURE_KEY, captured_taps
from serving.engine.refusals import RefusedError, refuse_unexplainable, refuse_unmonitorable, refuse_unsteerable
from serving.engine.runtime import load_deployment, policy_path
from serving.engine.trust import ROLLOUT_VARIABLE, ensure_key, ensure_rollout_key
from serving.json_logs import use_log_format
from serving.packages import shadowed_packages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from serving.engine.frontend import Frontend

log = structlog.get_logger(__name__)

EXIT_REFUSED = 2
INSTALLED = "telltale_frontend"
"""Attribute of vLLM's ``EngineArgs`` class that holds this process's front end once the plug-in is in place."""
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "serving.engine.worker.TelltaleCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "serving.engine.worker_cuda.TelltaleCUDAWorker",
}
_SCHEDULERS = {
    False: "serving.engine.scheduler.TelltaleScheduler",
    True: "serving.engine.scheduler.TelltaleAsyncScheduler",
}


def register() -> None:
    """Entry point of ``vllm.general_plugins``: does nothing unless ``TELLTALE_CONFIG`` is set."""
    if policy_path() is None:
        return
    try:
        problem = shadowed_packages()
        if problem is not None:
            raise RefusedError(problem)
        use_log_format()
        install()
    except TelltaleError as error:
        stop(error)


def stop(error: TelltaleError) -> None:
    """End the process: an error that vLLM would swallow must not leave it running unmonitored."""
    sys.stderr.write(f"telltale: {error}\n")
    sys.stderr.flush()
    os._exit(EXIT_REFUSED)


def install() -> Frontend:
    """Wrap what has to be wrapped in this process, once.

    Raises:
        CompatError: this vLLM is not the one that was read.
    """
    compat.require_version()
    from vllm.engine.arg_utils import EngineArgs

    already: Frontend | None = getattr(EngineArgs, INSTALLED, None)
    if already is not None:
        return already
    compat.require_touchpoints()
    from serving.engine.wraps import install_wraps

    frontend = install_wraps(configure)
    setattr(EngineArgs, INSTALLED, frontend)
    return frontend


def configure(config: VllmConfig) -> None:
    """Put our classes into a finished vLLM configuration.

    Raises:
        RefusedError: a setting would leave tokens unscored.
        probes.errors.TelltaleError: the policy, an artifact or the model is not usable.
    """
    refuse_unmonitorable(config, schedulers=_SCHEDULERS.values())
    if captured_taps(config):
        raise RefusedError(
            f"{CAPTURE_KEY} in --additional-config has the engine capture activations instead of reading what the "
            "policy's detectors read. Leave it out; telltale collect sets it in an engine of its own."
        )
    ensure_key()
    deployment = load_deployment(config)
    plan, bank = deployment.plan, deployment.plan.bank
    if not ensure_rollout_key() and plan.is_rolled_out:
        log.warning(
            "whom rules are rolled out to is drawn anew at each start; set the variable to a secret to keep it",
            variable=ROLLOUT_VARIABLE,
        )
    refuse_unsteerable(config, plan)
    refuse_unexplainable(config, explains=deployment.explained_tap is not None)
    use_tapped_worker(config)
    scheduling = config.scheduler_config
    scheduling.scheduler_cls = _SCHEDULERS[bool(scheduling.async_scheduling)]
    from serving.engine.gate_op import GATE_VERSION
    from serving.engine.ops import OP_VERSION
    from serving.engine.pick_op import PICK_VERSION
    from serving.engine.steer_op import STEER_VERSION

    # Part of vLLM's compile-cache key: a graph that was compiled without these taps, or with others, is never loaded.
    structure: dict[str, Any] = {
        "version": serving.__version__,
        "operator": OP_VERSION,
        "taps": [str(tap) for tap in bank.taps],
        "directions": bank.capacity,
        "steer_operator": STEER_VERSION,
        "steers": {str(matrix.tap): len(matrix.columns) for matrix in plan.steering.matrices},
        "gate_operator": GATE_VERSION,
        "gates": [[str(gate.tap), gate.steer] for gate in plan.steering.gates],
        "pick_operator": PICK_VERSION,
        "picks": str(deployment.explained_tap) if deployment.explained_tap is not None else None,
    }
    config.additional_config = {**_additional(config), "telltale": structure}
    log.info("monitoring", policy=str(policy_path()), taps=structure["taps"], digest=plan.digest[:12])


def use_tapped_worker(config: VllmConfig) -> None:
    """Put our worker class in the place of vLLM's.

    Raises:
        RefusedError: another one was chosen, which has no taps.
    """
    parallel = config.parallel_config
    worker = _WORKERS.get(parallel.worker_cls)
    if worker is None and parallel.worker_cls not in _WORKERS.values():
        raise RefusedError(
            f"the worker class is {parallel.worker_cls!r}; taps exist for {sorted(_WORKERS)}. Leave --worker-cls out."
        )
    parallel.worker_cls = worker or parallel.worker_cls


def _additional(config: VllmConfig) -> dict[str, Any]:
    if isinstance(config.additional_config, dict):
        return config.additional_config
    raise RefusedError("--additional-config must be a JSON object for telltale to add its structure to it.")
