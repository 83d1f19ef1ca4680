"""``telltale serve``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from monitor.sinks.sinks import require_sinks
from monitor.yaml_file import read_policy_file
from serving.api.tracing import TRACING_VARIABLE, is_tracing_on, require_tracing
from serving.arguments import ArgumentError, is_given, parse_serve, value_of, vllm_arguments
from serving.builtin import DEFAULT_MODEL, is_builtin
from serving.commands.model import embedded_folder, embedded_policy, say
from serving.deployment import check_policy, deploy
from serving.engine.launch import prepare_environment, require_free_port, run_server
from serving.json_logs import log_format as said_log_format
from serving.json_logs import pass_on, use_log_format
from serving.log_format import LogFormat
from serving.trail import require_trail

log = structlog.get_logger(__name__)


def serve(
    model: str | None,
    policy: Path | None,
    flags: Sequence[str],
    *,
    log_format: LogFormat | None = None,
    tracing: bool = False,
) -> None:
    """Check everything that can be checked in seconds, then start vLLM's server.

    Args:
        model: as named on the command line.
        policy: the policy file; the embedded model's if left out.
        flags: vLLM's.
        log_format: how logs are written; None: as the environment says.
        tracing: whether traces are sent; the environment may say so too.
    Raises:
        probes.errors.TelltaleError: something is wrong; the text says what.
    """
    if policy is None:
        if model is not None and not is_builtin(model):
            raise ArgumentError(
                f"model {model!r} has no policy of its own. Write one: telltale serve {model} --policy FILE."
            )
        policy = embedded_policy(model or DEFAULT_MODEL)
    file = read_policy_file(policy)
    arguments = parse_serve(model, flags, policy_model=file.config.model)
    require_free_port(arguments.host, arguments.port)
    if file.config.audit is not None:
        require_trail(file.config.audit.resolved(policy.absolute().parent))
    require_sinks([sink.resolved(policy.absolute().parent) for sink in file.config.sinks], os.environ)
    prepare_environment(policy)
    chosen = log_format or said_log_format()
    pass_on(chosen)
    use_log_format()
    if tracing:
        os.environ[TRACING_VARIABLE] = "1"
    if is_tracing_on():
        require_tracing()
    folder = embedded_folder(arguments.model)
    local = folder or (Path(arguments.model) if Path(arguments.model).is_dir() else None)
    dtype = value_of("--dtype", flags) or ("float32" if folder is not None else None)
    if local is not None and dtype not in {None, "auto"} and not is_given("--revision", flags):
        # The same check runs again in every process; here it fails before anything is loaded.
        deploy(policy, model_dir=local, model_id=arguments.model, dtype=str(dtype))
    else:
        check_policy(policy)
    if chosen is LogFormat.JSON:
        log.info("serving", model=arguments.model, policy=str(policy))
    else:
        say(f"serving {arguments.model} with {policy}; /ready answers 200 once monitoring is proved")
    run_server(vllm_arguments(arguments, folder))
