"""The command line of ``telltale serve``: ours taken out, vLLM's passed on, defaults only where nothing is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.arguments import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    ArgumentError,
    ServeArguments,
    is_embedded,
    is_given,
    parse_serve,
    value_of,
    vllm_arguments,
)
from serving.builtin import DEFAULT_MODEL


def test_nothing_said_is_the_embedded_model_on_this_machine_only() -> None:
    arguments = parse_serve(None, [], policy_model=None)
    assert arguments == ServeArguments(DEFAULT_MODEL, (), DEFAULT_HOST, DEFAULT_PORT)
    assert is_embedded(arguments.model)
    assert not is_embedded("meta/llama")


def test_the_model_comes_from_the_command_line_or_the_policy() -> None:
    assert parse_serve("m", [], policy_model=None).model == "m"
    assert parse_serve(None, [], policy_model="m").model == "m"
    assert parse_serve("m", [], policy_model="m").model == "m"
    with pytest.raises(ArgumentError, match="'a', the policy file 'b'"):
        parse_serve("a", [], policy_model="b")


@pytest.mark.parametrize("flags", [["--model", "x"], ["--model=x"]])
def test_a_second_way_to_name_the_model_is_refused(flags: list[str]) -> None:
    with pytest.raises(ArgumentError, match="telltale serve MODEL"):
        parse_serve(None, flags, policy_model=None)


@pytest.mark.parametrize(
    ("flags", "host", "port"),
    [
        (["--host", "0.0.0.0", "--port", "80"], "0.0.0.0", 80),  # noqa: S104 - a value to be read, nothing listens
        (["--port=9", "--host=::1"], "::1", 9),
        (["--port", "1", "--port", "2"], DEFAULT_HOST, 2),
        (["--port=1", "--port", "2", "--host", "a", "--host=b"], "b", 2),
        (["--port", "65535", "--enforce-eager"], DEFAULT_HOST, 65535),
    ],
)
def test_host_and_port_are_vllms(flags: list[str], host: str, port: int) -> None:
    arguments = parse_serve("m", flags, policy_model=None)
    assert (arguments.host, arguments.port, arguments.flags) == (host, port, tuple(flags))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "80a", "8.0", " 80", "²", "٣"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ArgumentError, match="number from 1 to 65535"):
        parse_serve("m", ["--port", port], policy_model=None)


def test_flags_are_passed_on_in_order_behind_the_model() -> None:
    flags = ["--tensor-parallel-size", "2", "--host", "::", "--trust-remote-code"]
    assert vllm_arguments(parse_serve("meta/llama", flags, policy_model=None), None) == ["meta/llama", *flags]


def test_without_a_host_it_is_reached_from_this_machine_only() -> None:
    assert vllm_arguments(parse_serve("m", [], policy_model=None), None) == ["m", "--host", DEFAULT_HOST]


def test_the_embedded_model_brings_its_settings(tmp_path: Path) -> None:
    built = vllm_arguments(parse_serve(None, [], policy_model=None), tmp_path)
    assert built[0] == str(tmp_path)
    assert value_of("--dtype", built) == "float32"
    assert value_of("--served-model-name", built) == DEFAULT_MODEL.partition(":")[2]
    assert value_of("--max-num-seqs", built) == "64"
    assert value_of("--kv-cache-memory-bytes", built) == "1073741824"
    assert "--enforce-eager" in built


@pytest.mark.parametrize(
    ("flags", "untouched"),
    [
        (["--dtype=bfloat16"], "--dtype"),
        (["--max_num_seqs", "8"], "--max-num-seqs"),
        (["--max-num-seqs=8"], "--max-num-seqs"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["--served-model-name", "mine"], "--served-model-name"),
    ],
)
def test_what_the_user_says_comes_before_a_default(tmp_path: Path, flags: list[str], untouched: str) -> None:
    built = vllm_arguments(parse_serve(None, flags, policy_model=None), tmp_path)
    assert built[1 : 1 + len(flags)] == flags
    assert untouched not in built[1 + len(flags) :]
    assert "--host" in built


def test_flags_are_found_in_every_spelling() -> None:
    assert is_given("--max-num-seqs", ["--max_num_seqs=3"])
    assert not is_given("--max-num", ["--max-num-seqs", "3"])
    assert value_of("--port", ["--port"]) is None
    assert value_of("--port", ["--port="]) == ""
    assert value_of("--port", ["--ports", "3"]) is None
