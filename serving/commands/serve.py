"""``telltale serve``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from monitor.yaml_file import read_policy_file
from serving.arguments import ArgumentError, is_given, parse_serve, value_of, vllm_arguments
from serving.builtin import DEFAULT_MODEL, is_builtin
from serving.commands.model import embedded_folder, embedded_policy, say
from serving.deployment import check_policy, deploy
from serving.engine.launch import prepare_environment, require_free_port, run_server
from serving.engine.runtime import WATCH_VARIABLE
from serving.trail import require_trail


def serve(model: str | None, policy: Path | None, flags: Sequence[str], *, watch_policy: bool = False) -> None:
    """Check everything that can be checked in seconds, then start vLLM's server.

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
    prepare_environment(policy)
    if watch_policy:
        os.environ[WATCH_VARIABLE] = "1"
    folder = embedded_folder(arguments.model)
    local = folder or (Path(arguments.model) if Path(arguments.model).is_dir() else None)
    dtype = value_of("--dtype", flags) or ("float32" if folder is not None else None)
    if local is not None and dtype not in {None, "auto"} and not is_given("--revision", flags):
        # The same check runs again in every process; here it fails before anything is loaded.
        deploy(policy, model_dir=local, model_id=arguments.model, dtype=str(dtype))
    else:
        check_policy(policy)
    say(f"serving {arguments.model} with {policy}; /ready answers 200 once monitoring is proved")
    run_server(vllm_arguments(arguments, folder))
