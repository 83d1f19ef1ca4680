"""``telltale serve``."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import structlog

from monitor.access import KeyScope
from monitor.sinks.sinks import require_sinks
from monitor.yaml_file import read_policy_file
from probes.statedir import user_state_dir
from serving.api.admin_key import FILE, ensure_admin_key
from serving.api.binding import require_keys
from serving.api.keys import VLLM_VARIABLE, ring_of, sender_digests, take_key_away
from serving.api.open_routes import OPENING, refuse_open_routes
from serving.api.tracing import TRACING_VARIABLE, is_tracing_on, require_tracing
from serving.arguments import ArgumentError, is_given, parse_serve, value_of, vllm_arguments
from serving.builtin import DEFAULT_MODEL, is_builtin
from serving.commands.model import embedded_folder, embedded_policy, say
from serving.deployment import check_policy, deploy
from serving.engine.launch import prepare_environment, require_free_port, run_server
from serving.engine.runtime import WATCH_VARIABLE
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
    watch_policy: bool = False,
    log_format: LogFormat | None = None,
    tracing: bool = False,
) -> None:
    """Check everything that can be checked in seconds, then start vLLM's server.

    Args:
        model: as named on the command line.
        policy: the policy file; the embedded model's if left out.
        flags: vLLM's.
        watch_policy: whether the policy file is put in force whenever it changes.
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
    # Here it fails before anything is loaded; the server looks again, at what its configuration file says too.
    given = {item.replace("_", "-") for item in flags}
    refuse_open_routes(Namespace(**{flag[2:].replace("-", "_"): flag in given for flag in OPENING}))
    if is_given("--api-key", flags):
        raise ArgumentError(
            "--api-key: whoever has an account on this machine could read the key among its processes. Put it into the "
            f"environment variable {VLLM_VARIABLE}, or its digest into the policy file (telltale key new)."
        )
    take_key_away()
    ring = ring_of(file.config, sender_digests())
    require_keys(file.config.access, ring, host=arguments.host, uds=value_of("--uds", flags))
    require_free_port(arguments.host, arguments.port)
    if file.config.audit is not None:
        require_trail(file.config.audit.resolved(policy.absolute().parent))
    require_sinks([sink.resolved(policy.absolute().parent) for sink in file.config.sinks], os.environ)
    prepare_environment(policy)
    if watch_policy:
        os.environ[WATCH_VARIABLE] = "1"
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
    if not ring.has(KeyScope.ADMIN):
        _ensure_admin_key()
    if chosen is LogFormat.JSON:
        log.info("serving", model=arguments.model, policy=str(policy))
    else:
        say(f"serving {arguments.model} with {policy}; /ready answers 200 once monitoring is proved")
    run_server(vllm_arguments(arguments, folder))


def _ensure_admin_key() -> None:
    folder = user_state_dir()
    made = ensure_admin_key(folder)
    if made is not None:
        say(
            f"administrator's key, shown this once and kept as a digest in {folder / FILE}: {made}\n"
            "It opens /telltale/, /docs and /metrics. Remove that file to have another one made."
        )
