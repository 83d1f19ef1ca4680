"""Logs as JSON, one object a line: ours, vLLM's and uvicorn's alike, with the request that they belong to.

Every process of a server reads from its environment whether it is to write them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import Processor

from probes.errors import TelltaleError
from serving.log_format import LogFormat

FORMAT_VARIABLE = "TELLTALE_LOG_FORMAT"
VLLM_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
_CONFIG = Path(__file__).with_name("json_logs.json")


class LogFormatError(TelltaleError, ValueError):
    """The environment names a format that there is not."""


def log_format() -> LogFormat:
    """What the environment says.

    Raises:
        LogFormatError: it names another format.
    """
    said = os.environ.get(FORMAT_VARIABLE) or LogFormat.TEXT.value
    try:
        return LogFormat(said)
    except ValueError as error:
        raise LogFormatError(f"{FORMAT_VARIABLE} is {said!r}; it must be text or json.") from error


def pass_on(chosen: LogFormat) -> None:
    """Say to the processes that are started from here on how logs are written.

    A logging configuration of the operator's own (VLLM_LOGGING_CONFIG_PATH) stays in place for vLLM's logs.
    """
    os.environ[FORMAT_VARIABLE] = chosen.value
    if chosen is LogFormat.JSON:
        os.environ.setdefault(VLLM_VARIABLE, str(_CONFIG))


def use_log_format() -> None:
    """Write this process's own logs as the environment says.

    Raises:
        LogFormatError: it names another format.
    """
    if log_format() is LogFormat.JSON:
        structlog.configure(
            processors=[*_shared(), _renderer()],
            logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
            cache_logger_on_first_use=False,
        )


def formatter() -> logging.Formatter:
    """For records of Python's own logging; named by ``json_logs.json``."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_shared(), structlog.stdlib.add_logger_name, _add_process],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer()],
    )


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Local variables of a frame hold prompts.
        structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
        ),
        structlog.processors.CallsiteParameterAdder([structlog.processors.CallsiteParameter.PROCESS]),
    ]


def _renderer() -> Processor:
    return structlog.processors.JSONRenderer(ensure_ascii=True)


def _add_process(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """VLLM's name of the process: APIServer, EngineCore, Worker."""
    record = event.get("_record")
    said = getattr(record, "vllm_process_name", None)
    if said is not None:
        event["process_name"] = said
    return event
