"""Nothing of vLLM's interface is unknown to the gateway: a release that adds a field fails here."""

import importlib.util
import os
import warnings
from collections.abc import Callable

import pytest

from azeotrope.config import ConfigError, build
from gateway.audit import engine_fields
from gateway.audit.engine_fields import EngineFields, Rulings, differences
from gateway.http.app import create_app
from gateway.http.requests import ChatRequest, CompletionRequest
from gateway.service import Gateway

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@pytest.fixture(scope="module")
def fields() -> EngineFields:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return engine_fields.read()


@needs_vllm
def test_every_field_of_chats_is_ruled_on(fields: EngineFields) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    found = ChatCompletionRequest.model_fields
    assert differences("ChatCompletionRequest", fields.chat, found) == []


@needs_vllm
def test_every_field_of_completions_is_ruled_on(fields: EngineFields) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    found = CompletionRequest.model_fields
    assert differences("CompletionRequest", fields.completion, found) == []


@needs_vllm
def test_every_sampling_parameter_is_ruled_on(fields: EngineFields) -> None:
    from vllm import SamplingParams

    found = SamplingParams.__struct_fields__
    assert differences("SamplingParams", fields.sampling, found) == []


@needs_vllm
def test_every_route_is_ruled_on(fields: EngineFields) -> None:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "any"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = build_app(args, ("generate",))
    found = {getattr(route, "path", str(route)) for route in app.routes}
    assert differences("routes", fields.routes, found) == []


def test_what_is_allowed_is_what_the_gateway_takes(fields: EngineFields) -> None:
    assert set(fields.chat.allowed) == set(ChatRequest.model_fields)
    assert set(fields.completion.allowed) == set(CompletionRequest.model_fields)
    assert fields.sampling.allowed == ()


def test_the_gateway_has_none_of_the_refused_routes(
    fields: EngineFields, gateway_factory: Callable[[], Gateway]
) -> None:
    paths = {getattr(route, "path", "") for route in create_app(gateway_factory()).routes}
    refused = {path for group in fields.routes.refused.values() for path in group}
    assert set(fields.routes.allowed) <= paths
    # Its own description, of its own fields.
    assert paths & refused <= {"/docs", "/docs/oauth2-redirect", "/openapi.json", "/redoc"}


def test_names_that_come_and_go_are_told_with_what_to_do() -> None:
    rulings = Rulings(allowed=("a",), fixed={}, refused={"leaks": ("b",)})
    assert differences("Some", rulings, ["a", "b"]) == []
    new, gone = differences("Some", rulings, ["a", "c"])
    assert "vLLM has 'c'" in new
    assert "put it under allowed, fixed or refused" in new
    assert "rules on 'b'" in gone
    with pytest.raises(ConfigError, match="several for a"):
        build(Rulings, {"allowed": ["a"], "fixed": {}, "refused": {"leaks": ["a"]}})
