"""Start an engine in earnest, prove that it is monitored, and say what was seen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from serving.deployment import Deployment
from serving.engine.canary import Canaries
from serving.engine.compat import installed_version
from serving.engine.plugin import install
from serving.engine.proof import Proof, prove


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        engine: distribution and version of vLLM.
        runner: the worker class that ran.
        scheduler: the scheduler class that ran.
        deployment: policy, artifacts and model.
        proof: what a request through the engine showed.
    """

    engine: tuple[str, str]
    runner: str
    scheduler: str
    deployment: Deployment
    proof: Proof


def diagnose(arguments: Sequence[str]) -> Diagnosis:
    """Start the engine with vLLM's arguments (the model first), prove, and stop it.

    Raises:
        probes.errors.TelltaleError: it is not monitored, or cannot be.
    """
    frontend = install()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="telltale doctor"))
    parsed = parser.parse_args(["--model", *arguments])
    config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config()

    async def run() -> Proof:
        engine = AsyncLLM.from_vllm_config(config)
        try:
            return await prove(engine, frontend, Canaries(engine, frontend))
        finally:
            engine.shutdown()

    proof = asyncio.run(run())
    return Diagnosis(
        engine=installed_version(),
        runner=config.parallel_config.worker_cls,
        scheduler=str(config.scheduler_config.scheduler_cls),
        deployment=frontend.deployment,
        proof=proof,
    )
