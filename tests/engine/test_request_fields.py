"""Every field that a request can have was judged; none that vLLM adds is served before somebody has looked at it."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.fields import REFUSED
from tests.support.judged_fields import JUDGED, Judgement, page

pytestmark = pytest.mark.engine

PATHS_WITHOUT_MODEL = {
    "/ping": "answers without looking at the body",
    "/invocations": "hands its body to the routes of chat and completions",
    "/v1/responses/{response_id}/cancel": "has no body",
    "/scale_elastic_ep": "closed for everybody",
    "/is_scaling_elastic_ep": "closed for everybody",
    "/v1/chat/completions/render": "closed without --enable-scale-out",
    "/v1/messages/render": "closed without --enable-scale-out",
    "/v1/completions/render": "closed without --enable-scale-out",
    "/v1/responses/render": "closed without --enable-scale-out",
    "/v1/chat/completions/derender": "closed without --enable-scale-out",
    "/v1/completions/derender": "closed without --enable-scale-out",
    "/inference/v1/generate": "closed without --enable-scale-out",
    "/inference/v1/abort_requests": "closed without --enable-scale-out",
}


def models_in(annotation: object) -> Iterator[type]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from models_in(part)


def api_routes(routes: typing.Iterable[typing.Any]) -> Iterator[typing.Any]:
    from fastapi.routing import APIRoute

    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from api_routes(route.original_router.routes)


@pytest.fixture(scope="module")
def posted() -> dict[str, list[type]]:
    """By the path of each route that takes a body: the models of it."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))
    found = {}
    for route in api_routes(app.routes):
        if {"POST", "PUT", "PATCH"} & route.methods:
            body = route.body_field
            found[route.path] = list(models_in(body.field_info.annotation)) if body is not None else []
    return found


def names_of_all(models: typing.Iterable[type]) -> set[str]:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

    names = {name for model in models for name in typing.cast("typing.Any", model).model_fields}
    names |= {"token_ids"} & set(GenerateRequest.model_fields)
    names |= set(SamplingParams.__struct_fields__)
    return names | set(StructuredOutputsParams.__dataclass_fields__) - {"_backend", "_backend_was_auto"}


def test_every_field_was_judged(posted: dict[str, list[type]]) -> None:
    names = names_of_all(model for models in posted.values() for model in models)
    unjudged = sorted(names - set(JUDGED))
    assert not unjudged, f"vLLM has fields that nobody has judged: {unjudged}. Look at them; then add them to JUDGED."
    assert set(JUDGED) - names == set(), "these are judged, and vLLM does not have them"


def test_every_route_has_a_model_or_a_reason(posted: dict[str, list[type]]) -> None:
    assert {path for path, models in posted.items() if not models} == set(PATHS_WITHOUT_MODEL)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"} <= set(posted)


def test_what_we_refuse_is_judged_so() -> None:
    assert {name for name, (judgement, _) in JUDGED.items() if judgement is Judgement.REFUSED} >= set(REFUSED)


def test_the_page_is_the_lists() -> None:
    written = (Path(__file__).parents[2] / "docs/request-fields.md").read_text()
    assert written == page(), "write it anew: .venv/bin/python -m tests.support.judged_fields"
