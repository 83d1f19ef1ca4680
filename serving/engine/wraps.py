"""Every function of vLLM that is wrapped, in one place; each is listed in ``serving.engine.compat`` with its hash."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import vllm.plugins
from vllm.distributed.device_communicators import shm_broadcast
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.platforms import current_platform
from vllm.renderers.base import BaseRenderer
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from serving.engine import rendering, responses
from serving.engine.endpoints import require_ours
from serving.engine.frontend import Frontend
from serving.engine.runtime import load_deployment
from serving.engine.waiting import asleep

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def install_wraps(configure: Callable[[VllmConfig], None]) -> Frontend:
    """Wrap them all.

    Args:
        configure: puts our classes into a vLLM configuration.
    Returns: the front end that the wraps work with.
    """
    frontend = Frontend()
    _wrap(EngineArgs, "create_engine_config", lambda original: _engine_config(original, configure, frontend))
    _wrap(BaseRenderer, "render_chat_async", rendering.render_chat_async)
    _wrap(InputProcessor, "assign_request_id", lambda original: _assign_request_id(original, frontend), static=True)
    _wrap(OutputProcessor, "process_outputs", lambda original: _process_outputs(original, frontend))
    _wrap(RequestState, "_new_completion_output", lambda original: _completion_output(original, frontend))
    _wrap(OpenAIServingChat, "chat_completion_stream_generator", responses.chat_stream)
    _wrap(OpenAIServingChat, "chat_completion_full_generator", responses.chat_full)
    _wrap(OpenAIServingCompletion, "completion_stream_generator", responses.completion_stream)
    _wrap(OpenAIServingCompletion, "request_output_to_completion_response", responses.completion_full)
    _wrap(vllm.plugins, "load_endpoint_plugins", require_ours)
    if current_platform.is_cpu():
        _wrap(shm_broadcast, "sched_yield", asleep)
    EngineCore.telltale_control = _engine_control
    return frontend


def _wrap(
    owner: type | ModuleType,
    name: str,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    static: bool = False,
) -> None:
    original = getattr(owner, name)
    wrapper = functools.wraps(original)(make(original))
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def _engine_config(
    original: Callable[..., VllmConfig], configure: Callable[[VllmConfig], None], frontend: Frontend
) -> Callable[..., VllmConfig]:
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        config = original(self, *args, **kwargs)
        configure(config)
        frontend.configure(load_deployment(config))
        return config

    return create_engine_config


def _assign_request_id(original: Callable[[Any], None], frontend: Frontend) -> Callable[[Any], None]:
    def assign_request_id(request: Any) -> None:
        original(request)
        frontend.sign(request)

    return assign_request_id


def _process_outputs(original: Callable[..., Any], frontend: Frontend) -> Callable[..., Any]:
    def process_outputs(self: OutputProcessor, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, frontend.take_out(engine_core_outputs), *args, **kwargs)

    return process_outputs


def _completion_output(original: Callable[..., Any], frontend: Frontend) -> Callable[..., Any]:
    def new_completion_output(self: RequestState, *args: Any, **kwargs: Any) -> Any:
        return frontend.dress(self, original(self, *args, **kwargs))

    return new_completion_output


def _engine_control(self: EngineCore, op: str, body: dict[str, Any]) -> dict[str, Any]:
    """The door into EngineCore, run between two steps: what its scheduler answers; nothing if it is not ours."""
    control = getattr(self.scheduler, "telltale_control", None)
    return control(op, body) if control is not None else {}
