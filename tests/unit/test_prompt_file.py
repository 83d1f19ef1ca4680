"""A file of prompts: three forms, everything else is kept, and a wrong line is told by its number."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from probes.fit.rows.prompt_file import PromptFile, PromptFileError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}
REPLY = {"role": "assistant", "content": "Because."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "42", "tool_call_id": "c"}


def saved(folder: Path, *lines: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_all_forms_are_read(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        {"text": "Why?", "label": 1, "group": "g"},
        {"prompt": "Why?", "response": "Because."},
        "",
        {"messages": [SYSTEM, USER]},
        {"messages": [SYSTEM, USER, REPLY], "id": 7},
        {"messages": [USER, CALL, TOOL], "response": "Because."},
    )
    file = PromptFile.open(path)
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.count == 5
    text, answered, chat, replied, called = file.lines()
    assert [line.number for line in file.lines()] == [1, 2, 4, 5, 6]
    assert (text.messages, text.text, text.response) == ((USER,), "Why?", None)
    assert text.fields == {"label": 1, "group": "g"}
    assert (answered.messages, answered.text, answered.response) == ((USER,), "Why?", "Because.")
    assert (chat.messages, chat.text, chat.response) == ((SYSTEM, USER), None, None)
    assert (replied.messages, replied.response, replied.fields) == ((SYSTEM, USER), "Because.", {"id": 7})
    assert (called.messages, called.response) == ((USER, CALL, TOOL), "Because.")
    assert list(file.lines(3)) == [replied, called]


def test_characters_that_end_lines_elsewhere_do_not_end_one_here(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four", "five\u2029six"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [line.text for line in PromptFile.open(path).lines()] == texts


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ({}, "exactly one of"),
        ({"label": 1}, "exactly one of"),
        ({"text": "a", "prompt": "b"}, "exactly one of"),
        ({"text": ""}, "text: "),
        ({"text": 1}, "text: "),
        ({"text": "a", "response": ""}, "response: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\.0\.role: "),
        ({"messages": [{"role": "user"}]}, r"messages\.0: .*'content'"),
        ({"messages": [REPLY]}, "has a prompt before it"),
        ({"messages": [USER, CALL]}, "says something"),
        ({"messages": [USER, REPLY], "response": "Because."}, "stands twice"),
    ],
)
def test_a_wrong_line_is_told_by_its_number(tmp_path: Path, line: object, why: str) -> None:
    path = saved(tmp_path, {"text": "fine"}, "", line)
    with pytest.raises(PromptFileError, match=rf"prompts\.jsonl:3: .*{why}"):
        PromptFile.open(path)


def test_the_text_of_a_wrong_line_is_not_repeated(tmp_path: Path) -> None:
    path = saved(tmp_path, {"text": "secret", "prompt": "secret"})
    with pytest.raises(PromptFileError) as caught:
        PromptFile.open(path)
    assert "secret" not in str(caught.value)


def test_a_line_that_is_no_use_here_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, {"text": "fine", "response": "yes"}, {"text": "bad"})
    with pytest.raises(PromptFileError, match=r":2: has no reply\. Correct this line"):
        PromptFile.open(path, require=lambda line: "has no reply." if line.response is None else None)


@pytest.mark.parametrize("data", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, data: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(data)
    with pytest.raises(PromptFileError, match="holds no line"):
        PromptFile.open(path)
    with pytest.raises(PromptFileError, match="cannot be read"):
        PromptFile.open(tmp_path / "nowhere.jsonl")
