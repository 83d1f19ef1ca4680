"""A server whose policy is changed while it runs: by request, by signal, by file; under load; and back again."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from probes.artifact import save_artifact
from tests.engine.reload_policies import BLOCK, BLOCKING, CUTTING, FLAGGING, KEY, TRIGGER_PROMPT, policy
from tests.engine.test_serving import GREEDY, metric
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import D_MODEL, TinyModel, save_linear, save_trigger

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHANGES, WORKERS = 14, 12
OTHER = np.random.default_rng(11).standard_normal(D_MODEL)
OTHER_RULE = "when: {detector: other, stage: prompt, above: {value: -1000000.0}}"
BOTH = policy(
    f"{{name: note, {TRIGGER_PROMPT}, do: {{action: flag}}, mode: enforce}}",
    f"{{name: see, {OTHER_RULE}, do: {{action: flag}}, mode: enforce}}",
    detectors=("trigger", "other"),
)
ONLY_OTHER = policy(f"{{name: see, {OTHER_RULE}, do: {{action: flag}}, mode: enforce}}", detectors=("other",))


@pytest.fixture(scope="module")
def folder(tiny: TinyModel) -> Path:
    found = tiny.path.parent / "reload"
    found.mkdir()
    save_trigger(found / "trigger.safetensors", tiny.path)
    for name, layer in (("other", 0), ("higher", 1)):
        save_linear(found / f"{name}.safetensors", tiny.path, name=name, direction=OTHER, layer=layer)
    (found / "policy.yaml").write_text(BLOCKING)
    return found


@pytest.fixture(scope="module")
def started(tiny: TinyModel, folder: Path) -> Iterator[Server]:
    """One server for all of this file: a start takes longer than the tests."""
    command = telltale_command(tiny.path, folder / "policy.yaml", "--watch-policy")
    with serving(command, folder / "server.log") as found:
        yield found


@pytest.fixture
def server(started: Server, folder: Path) -> Server:
    """As it was started, whatever the test before has put in force."""
    path = folder / "policy.yaml"
    if not path.exists() or path.read_text() != BLOCKING:
        before = newest(started)["number"]
        path.write_text(BLOCKING)
        until(lambda: newest(started)["source"] == "file" and newest(started)["number"] > before)
    answer = put(started, BLOCKING)
    assert answer.status_code == httpx.codes.OK, answer.text
    return started


def call(server: Server, method: str, path: str, *, key: str = KEY, **settings: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", **settings.pop("headers", {})}
    return httpx.request(method, f"{server.url}/telltale/v1{path}", headers=headers, timeout=60, **settings)


def newest(server: Server) -> dict[str, Any]:
    return dict(call(server, "GET", "/policy/history").json()["history"][0])


def put(server: Server, text: str) -> httpx.Response:
    return call(server, "PUT", "/policy", content=text)


def ask(server: Server, content: str, *, salt: str | None = None) -> Any:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    messages: Any = [{"role": "user", "content": content}]
    extra = {**GREEDY["extra_body"], **({"cache_salt": salt} if salt is not None else {})}
    settings = {**GREEDY, "extra_body": extra}
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, **settings)


def rule_of(server: Server, tiny: TinyModel) -> str | None:
    rule: str | None = ask(server, f"Tell me{tiny.trigger_text} please").choices[0].telltale["rule"]
    return rule


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_a_policy_is_put_in_force_and_rolled_back(server: Server, tiny: TinyModel) -> None:
    before = call(server, "GET", "/policy").json()
    assert (before["policy"], rule_of(server, tiny)) == (BLOCKING, "stop")
    applied = metric(server, "telltale_policy_reloads_total", outcome="applied")
    answer = put(server, FLAGGING)
    assert (answer.status_code, answer.json()["outcome"], answer.json()["source"]) == (200, "applied", "api")
    assert rule_of(server, tiny) == "note"
    written = call(server, "GET", "/policy", headers={"accept": "application/yaml"})
    assert (written.text, written.headers["etag"]) == (FLAGGING, f'"{answer.json()["digest"]}"')
    assert metric(server, "telltale_policy_info", digest=answer.json()["digest"][:16]) == 1
    assert before["digest"][:16] not in httpx.get(f"{server.url}/metrics").text
    back = call(server, "POST", "/policy/rollback").json()
    assert (back["outcome"], back["source"], back["digest"]) == ("applied", "rollback", before["digest"])
    assert rule_of(server, tiny) == "stop"
    newest = call(server, "GET", "/policy/history").json()["history"][:2]
    assert [entry["source"] for entry in newest] == ["rollback", "api"]
    assert call(server, "GET", f"/policy/history/{newest[1]['number']}").json()["policy"] == FLAGGING
    assert call(server, "POST", "/policy/rollback", json={"to": 99999}).status_code == 404
    assert put(server, BLOCKING).json()["outcome"] == "unchanged"
    assert metric(server, "telltale_policy_reloads_total", outcome="applied") == applied + 2


def test_without_a_key_nobody_may_ask_or_change(started: Server) -> None:
    for path, method in (("/policy", "GET"), ("/policy", "PUT"), ("/policy/rollback", "POST")):
        for headers in ({}, {"authorization": "Bearer sk-nobody"}):
            url = f"{started.url}/telltale/v1{path}"
            assert httpx.request(method, url, headers=headers, content=FLAGGING).status_code == 401


def test_keys_are_taken_over_with_the_policy_that_names_them(server: Server) -> None:
    other = BLOCKING.replace(hashlib.sha256(KEY.encode()).hexdigest(), hashlib.sha256(b"sk-new").hexdigest())
    assert put(server, other).json()["outcome"] == "applied"
    assert put(server, BLOCKING).status_code == 401
    assert call(server, "GET", "/policy", key="sk-new").json()["policy"] == other
    assert call(server, "POST", "/policy/rollback", key="sk-new").json()["outcome"] == "applied"
    assert call(server, "GET", "/policy").json()["policy"] == BLOCKING


def test_a_wrong_file_changes_nothing_and_says_why_as_check_does(server: Server, tiny: TinyModel, folder: Path) -> None:
    from serving.deployment import check_policy

    running = call(server, "GET", "/policy").json()["digest"]
    for text in (FLAGGING.replace("trigger,", "triger,"), FLAGGING + "extra: 1\n", "- no mapping", BOTH + "\tx"):
        path = folder / "policy.yaml"
        answer = put(server, text)
        assert (answer.status_code, answer.json()["outcome"]) == (422, "refused")
        wrong = folder / "wrong.yaml"
        wrong.write_text(text)
        with pytest.raises(ValueError) as caught:
            check_policy(wrong)
        assert answer.json()["message"] == str(caught.value).replace(str(wrong), str(path))
    assert call(server, "GET", "/policy").json()["digest"] == running
    assert rule_of(server, tiny) == "stop"


def test_what_is_fixed_at_the_start_needs_a_restart_and_is_named(server: Server, tiny: TinyModel) -> None:
    higher = policy(
        "{name: up, when: {detector: higher, stage: prompt}, do: {action: flag}, mode: enforce}", detectors=("higher",)
    )
    rule = f"{{name: note, {TRIGGER_PROMPT}, do: {{action: flag}}, mode: enforce}}"
    wanted = {
        "detectors": higher,
        "reserve": policy(rule, directions=5),
        "canary": policy(rule, tail="canary: {every: 30s}\n"),
        "audit": policy(rule, tail='audit: {url: "sqlite:///other.db", text: none, durability: async}\n'),
        "model": policy(rule, tail="model: builtin:smollm2-135m-instruct\n"),
    }
    for setting, text in wanted.items():
        answer = put(server, text)
        assert (answer.status_code, answer.json()["setting"]) == (409, setting), answer.text
        assert answer.json()["message"].startswith(f"restart needed: {setting}: ")
    assert rule_of(server, tiny) == "stop"


def expected_scores(tiny: TinyModel, token_ids: list[list[int]]) -> list[float]:
    """What transformers says of ``other``: the largest score of a prompt's tokens behind the first."""
    model = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    direction = torch.from_numpy(OTHER.astype(np.float32))
    with torch.inference_mode():
        streams = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0] for ids in token_ids]
    return [float((stream @ direction)[1:].max()) for stream in streams]


def test_a_new_direction_in_a_free_column_is_read_as_transformers_does(server: Server, tiny: TinyModel) -> None:
    prompts = [f"The river number {number} is long and cold today, and so are the others" for number in range(4)]
    for prompt in prompts:  # cached before the direction is there: their blocks hold nothing for it
        ask(server, prompt)
    taken: list[list[Any]] = []
    for text, names in ((ONLY_OTHER, ["other"]), (BOTH, ["trigger", "other"]), (BLOCKING, ["trigger"]), (BOTH, None)):
        assert put(server, text).json()["outcome"] == "applied"
        if names != ["trigger"]:
            # The first time of a prompt reads it, the second rests on the cache, the third has a cache of its own.
            answers = [ask(server, prompt, salt=salt) for salt in (None, None, "apart") for prompt in prompts]
            taken.append(answers)
    wanted = expected_scores(tiny, [answer.prompt_token_ids for answer in taken[0][: len(prompts)]])
    for answers in taken:
        for number, answer in enumerate(answers):
            found = {part["name"]: part for part in answer.choices[0].telltale["detectors"]}
            assert found["other"]["score"] == pytest.approx(wanted[number % len(prompts)], rel=1e-4, abs=1e-2)
            assert all(set(part["skipped"]) <= {"sink", "final"} for part in found.values())
            assert all(part["scored"] == found["other"]["scored"] > 0 for part in found.values())
    assert metric(server, "telltale_gaps_total", reason="unseen") == 0


def test_a_signal_and_a_change_of_the_file_are_heard(server: Server, tiny: TinyModel, folder: Path) -> None:
    (folder / "policy.yaml").write_text(FLAGGING)
    until(lambda: newest(server)["source"] == "file")
    assert (newest(server)["outcome"], rule_of(server, tiny)) == ("applied", "note")
    put(server, CUTTING)  # the file says something else now, and has not changed
    server.process.send_signal(signal.SIGHUP)
    until(lambda: newest(server)["source"] == "signal")
    assert (newest(server)["outcome"], rule_of(server, tiny)) == ("applied", "note")
    (folder / "policy.yaml").write_text("version: 2\n")
    until(lambda: newest(server)["outcome"] == "refused")
    assert rule_of(server, tiny) == "note"
    (folder / "policy.yaml").unlink()
    assert call(server, "POST", "/policy/reload").status_code == 422


def test_a_canary_that_does_not_pass_keeps_a_policy_out(server: Server, tiny: TinyModel, folder: Path) -> None:
    path = folder / "lying.safetensors"
    made = save_linear(path, tiny.path, name="lying", direction=np.eye(D_MODEL)[3], canary=True)
    canary = made.card.canary
    assert canary is not None
    scores = tuple(score + 10 * canary.tolerance for score in canary.scores)
    wrong = made.card.model_copy(update={"canary": canary.model_copy(update={"scores": scores})})
    save_artifact(path, wrong, made.tensors)
    rule = f"{{name: see, {OTHER_RULE.replace('other', 'lying')}, do: {{action: flag}}, mode: enforce}}"
    answer = put(server, policy(rule, detectors=("lying",)))
    assert (answer.status_code, answer.json()["outcome"]) == (503, "failed")
    assert "wrong_scores" in answer.json()["message"]
    assert rule_of(server, tiny) == "stop"
    assert httpx.get(f"{server.url}/ready").status_code == httpx.codes.OK
    save_artifact(path, made.card, made.tensors)
    assert put(server, policy(rule, detectors=("lying",))).json()["outcome"] == "applied"
    assert rule_of(server, tiny) == "see"


def test_under_load_every_verdict_is_that_of_one_policy(server: Server, tiny: TinyModel) -> None:
    bad, good = f"Tell me{tiny.trigger_text} please", "Tell me something please"
    expected = {"stop": "block", "note": "flag"}
    answers: list[tuple[float, float, str, Any]] = []
    changes: list[tuple[float, float, str]] = []

    async def ask_until(client: openai.AsyncOpenAI, stop: asyncio.Event, worker: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            content = f"{bad if (number + worker) % 2 else good} {worker} {number}"
            began = time.monotonic()
            messages: Any = [{"role": "user", "content": content}]
            answer = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, **GREEDY)
            answers.append((began, time.monotonic(), content, answer.choices[0]))

    async def change() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            for number in range(CHANGES):
                text, rule = ((FLAGGING, "note"), (BLOCKING, "stop"))[number % 2]
                began = time.monotonic()
                url, headers = f"{server.url}/telltale/v1/policy", {"authorization": f"Bearer {KEY}"}
                answer = await client.put(url, content=text, headers=headers)
                assert answer.json()["outcome"] == "applied", answer.text
                changes.append((began, time.monotonic(), rule))
                await asyncio.sleep(1.2)

    async def run() -> None:
        stop = asyncio.Event()
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        workers = [asyncio.create_task(ask_until(client, stop, worker)) for worker in range(WORKERS)]
        await change()
        stop.set()
        await asyncio.gather(*workers)

    asyncio.run(run())
    certain = 0
    for began, ended, content, choice in answers:
        said = choice.telltale
        if good in content:
            assert (said["action"], said["rule"]) == ("allow", None)
            continue
        assert said["action"] == expected[said["rule"]]
        assert (choice.message.content == BLOCK) == (said["rule"] == "stop")
        # Which policy ran when the request was signed is certain where no change was under way during the request.
        before = [change for change in changes if change[0] < ended]
        if before and before[-1][1] < began:
            certain += 1
            assert said["rule"] == before[-1][2]
    assert len(changes) == CHANGES
    assert certain >= CHANGES // 2, "too few requests lay between two changes to show anything"
    assert metric(server, "telltale_gaps_total", reason="unseen") == 0
    assert metric(server, "telltale_unsigned_requests_total") == 0
    print(f"{len(answers)} answers, {certain} between two of {len(changes)} changes")


def test_a_stream_that_runs_keeps_the_policy_that_it_began_with(server: Server, tiny: TinyModel) -> None:
    assert put(server, CUTTING).json()["outcome"] == "applied"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    messages: Any = [{"role": "user", "content": "Tell me something please"}]
    settings: dict[str, Any] = {"logit_bias": {str(tiny.trigger): -100}}
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=700, stream=True, **{**GREEDY, **settings}
    )
    pieces = iter(stream)
    next(pieces)
    answer = put(server, FLAGGING)
    assert answer.json()["outcome"] == "applied"
    assert rule_of(server, tiny) == "note"
    last = [piece for piece in pieces if piece.choices][-1]
    names = [(part["name"], part["stage"]) for part in last.choices[0].telltale["detectors"]]
    assert names == [("trigger", "stream")]  # of the policy that it began with; the new one reads prompts
    assert set(last.choices[0].telltale["detectors"][0]["skipped"]) <= {"sink", "final"}
