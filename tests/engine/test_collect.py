"""``telltale collect`` with a real engine: activations are transformers', scores the server's, a kill costs a shard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from monitor.types import Role
from probes.card import Format
from probes.fit.reading.activation_manifest import Manifest, StoreError
from probes.fit.reading.activation_store import ActivationStore, StoredRequest
from probes.modelref import read_model_ref
from probes.taps import Site, Tap
from tests.support.tiny import D_MODEL, TinyModel, save_linear

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TAPS = (Tap(0), Tap(1), Tap(0, Site.ATTN_OUT), Tap(1, Site.MLP_OUT))
CHUNK = 64
"""Tokens in a step: longer prompts are cut."""
ENGINE = {
    "kv_cache_memory_bytes": 134217728,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": CHUNK,
}
FLAGS = [item for name, value in ENGINE.items() for item in (f"--{name.replace('_', '-')}", str(value))]
WORDS = ["river", "stone", "lantern", "harvest", "copper", "meadow", "winter", "signal", "garden", "paper"]


def words(generator: np.random.Generator, count: int) -> str:
    return " ".join(generator.choice(WORDS, size=count).tolist())


def lines(count: int) -> list[dict]:
    """Prompts, conversations and replies of different lengths, in turns."""
    generator = np.random.default_rng(8)
    made: list[dict] = []
    for number in range(count):
        text = words(generator, int(generator.integers(2, 90)))
        match number % 4:
            case 0:
                line: dict = {"text": text}
            case 1:
                line = {"prompt": text, "response": words(generator, 6)}
            case 2:
                turns = [("system", "Be brief."), ("user", text), ("assistant", "Yes."), ("user", "And then?")]
                line = {"messages": [{"role": role, "content": content} for role, content in turns]}
            case _:
                turns = [("user", "Look it up."), ("tool", text), ("assistant", words(generator, 5))]
                line = {"messages": [{"role": role, "content": content} for role, content in turns]}
        made.append({**line, "label": number % 2, "id": f"n{number}"})
    return made


def command(model: TinyModel, prompts: Path, out: Path, *options: str, taps: Sequence[Tap] = TAPS) -> list[str]:
    chosen = ["--out", str(out), "--taps", ",".join(map(str, taps)), "--model", str(model.path)]
    return [
        sys.executable, "-m", "serving.cli", "collect", str(prompts), *chosen, "--dtype", "float32", "--enforce-eager",
        *FLAGS, *options,
    ]  # fmt: skip


def collect(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, **settings), capture_output=True, text=True, check=False, cwd=ROOT)


def saved(path: Path, made: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("collect") / "prompts.jsonl", lines(120))


@pytest.fixture(scope="module")
def whole(tiny: TinyModel, prompts: Path) -> Path:
    """Every token of every line, in many shards."""
    out = prompts.parent / "whole"
    done = collect(tiny, prompts, out, "--positions", "all", "--shard-tokens", "150")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert done.stdout == ""
    return out


@pytest.fixture(scope="module")
def store(whole: Path, tiny: TinyModel) -> ActivationStore:
    return ActivationStore.open(whole, model=read_model_ref(tiny.path, model_id="tiny", dtype="float32"))


def test_activations_equal_transformers(store: ActivationStore, tiny: TinyModel) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32, attn_implementation="eager").eval()
    seen: dict[Tap, np.ndarray] = {}
    for tap in store.taps:
        layer = network.model.layers[tap.layer]
        module = {Site.RESID_POST: layer, Site.ATTN_OUT: layer.self_attn, Site.MLP_OUT: layer.mlp}[tap.site]
        module.register_forward_hook(
            lambda module, inputs, output, tap=tap: seen.__setitem__(
                tap, (output[0] if isinstance(output, tuple) else output).reshape(-1, D_MODEL).numpy()
            )
        )
    assert set(store.taps) == set(TAPS)
    chunked = 0
    with torch.inference_mode():
        for request in store:
            network(torch.tensor(request.tokens.tolist())[None])
            chunked += len(request.tokens) > CHUNK
            for tap in store.taps:
                expected = seen[tap]
                assert request.at(tap).shape == expected.shape == (request.record.num_tokens, D_MODEL)
                difference = np.abs(request.at(tap) - expected)
                norms = np.linalg.norm(expected, axis=1, keepdims=True)
                assert np.all(difference <= 1e-4 * norms)
                assert np.median(difference / norms) <= 1e-6
    assert len(store) == 120
    assert chunked > 20


def text_of(tokenizer: AutoTokenizer, request: StoredRequest, role: Role) -> str:
    return tokenizer.decode(request.tokens[request.roles == role.code].tolist()).strip()


def test_prompts_are_the_servers_and_roles_are_kept(store: ActivationStore, tiny: TinyModel, prompts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    assert store.manifest.roles == {role.value: role.code for role in Role}
    for line, request in zip(map(json.loads, prompts.read_text().splitlines()), store, strict=True):
        assert request.record.fields == {"label": line["label"], "id": line["id"]}
        assert request.positions.tolist() == list(range(len(request.tokens)))
        messages = list(line.get("messages") or [{"role": "user", "content": line.get("text") or line["prompt"]}])
        response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else line.get("response")
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(rendered, add_special_tokens=False)
        reply = tokenizer.encode(response, add_special_tokens=False) if response else []
        assert request.tokens.tolist() == prompt + reply
        assert request.record.num_prompt == len(prompt)
        assert request.is_response.tolist() == [False] * len(prompt) + [True] * len(reply)
        assert np.all(request.roles[request.is_response] == Role.ASSISTANT.code)
        for role in (Role.SYSTEM, Role.USER, Role.TOOL):
            said = [message["content"] for message in messages if message["role"] == role.value]
            found = text_of(tokenizer, request, role)
            # Words of two messages of one role stand beside each other here.
            assert found.replace(" ", "") == "".join(said).replace(" ", "")
    assert np.all(store[0].roles[-3:] == Role.TEMPLATE.code)


def test_scores_of_collected_rows_are_the_servers(store: ActivationStore, tiny: TinyModel, tmp_path: Path) -> None:
    """A linear detector on what was collected, and the same one in the bank of an engine that serves."""
    generator = np.random.default_rng(4)
    names = {}
    for tap in TAPS:
        direction = generator.standard_normal(D_MODEL)
        name = f"{tap.site.value}_{tap.layer}"
        save_linear(
            tmp_path / f"{name}.safetensors", tiny.path, name=name, direction=direction, layer=tap.layer,
            site=tap.site, bias=0.5, threshold=1e9,
        )  # fmt: skip
        names[tap] = (name, direction)
    entries = "".join(f"  - artifact: {name}.safetensors\n" for name, _ in names.values())
    watched = names[TAPS[0]][0]
    rule = f"{{name: watch, when: {{detector: {watched}, stage: prompt}}, do: {{action: flag}}, mode: enforce}}"
    (tmp_path / "policy.yaml").write_text(
        f'version: "1"\ndetectors:\n{entries}policies:\n'
        f"  - {{name: default, on_gap: block, on_uncalibrated: allow, rules: [{rule}]}}\n"
    )
    chosen = [store[number] for number in range(0, len(store), 6)]
    order = {
        "policy": str(tmp_path / "policy.yaml"),
        "engine": {
            "model": str(tiny.path), "dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, **ENGINE
        },
        "runs": [[request.tokens.tolist() for request in chosen]],
        "new_tokens": 1,
    }  # fmt: skip
    served = tmp_path / "served.npz"
    program = [sys.executable, "-m", "serving.engine.readings", str(served)]
    subprocess.run(program, input=json.dumps(order), text=True, check=True, cwd=ROOT)
    from serving.deployment import deploy

    bank = deploy(tmp_path / "policy.yaml", model_dir=tiny.path, model_id="tiny", dtype="float32").plan.bank
    with np.load(served) as rows:
        for number, request in enumerate(chosen):
            scores = bank.score(rows[f"0.{number}.readouts"])
            for tap, (name, direction) in names.items():
                stream = request.at(tap).astype(np.float64)
                offline = stream @ direction.astype(np.float32).astype(np.float64) + 0.5
                scale = np.linalg.norm(stream, axis=1) * np.linalg.norm(direction)
                assert np.all(np.abs(scores[:, bank.index[name]] - offline) <= 1e-5 * scale)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_killed_run_goes_on_to_the_same_bytes(tiny: TinyModel, prompts: Path, whole: Path, tmp_path: Path) -> None:
    options = ("--positions", "all", "--shard-tokens", "150")
    run = subprocess.Popen(
        command(tiny, prompts, tmp_path, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and run.poll() is None:
        if len(list(tmp_path.glob("shard-*.safetensors"))) > 5:
            break
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    killed = Manifest.read(tmp_path)
    assert killed.shards
    assert not killed.complete
    before = {name: data for name, data in contents(tmp_path).items() if name.startswith("shard-00000")}
    done = collect(tiny, prompts, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert f"{killed.requests} of 120 requests are there" in done.stderr
    assert contents(tmp_path) == contents(whole)
    assert before.items() <= contents(tmp_path).items()
    # Once complete, nothing is computed again, and other arguments are refused.
    again = collect(tiny, prompts, tmp_path, *options)
    assert (again.returncode, "is complete already" in again.stderr) == (0, True), again.stderr
    other = collect(tiny, prompts, tmp_path, "--positions", "last", "--shard-tokens", "150")
    assert other.returncode == 2
    assert "positions was all, is last" in other.stderr
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("text_format", "positions"), [("chat", "last"), ("chat", "template"), ("chat", "response"), ("raw", "response")]
)
def test_kept_positions(
    tiny: TinyModel, tmp_path: Path, store: ActivationStore, *, text_format: str, positions: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    made = [line for line in lines(120) if "prompt" in line]
    path = saved(tmp_path / "prompts.jsonl", made)
    out = tmp_path / "out"
    done = collect(tiny, path, out, "--positions", positions, "--format", text_format, taps=TAPS[:2])
    assert done.returncode == 0, done.stderr
    found = ActivationStore.open(out)
    full = {request.record.fields["id"]: request for request in store}
    ending = len(tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False))
    for line, request in zip(made, found, strict=True):
        same = full[line["id"]]
        num_prompt = same.record.num_prompt
        if text_format == Format.RAW:
            num_prompt = len(tokenizer.encode(line["prompt"]))
            reply = tokenizer.encode(line["response"], add_special_tokens=False)
            assert request.tokens.tolist() == reply
            assert request.positions[0] == num_prompt == request.record.num_prompt
            continue
        span = {
            "last": slice(num_prompt - 1, num_prompt),
            "template": slice(num_prompt - ending, num_prompt),
            "response": slice(num_prompt, None),
        }[positions]
        assert request.positions.tolist() == same.positions[span].tolist()
        assert request.tokens.tolist() == same.tokens[span].tolist()
        for tap in found.taps:
            expected = same.at(tap)[span]
            norms = np.linalg.norm(expected, axis=1, keepdims=True)
            assert np.all(np.abs(request.at(tap) - expected) <= 1e-4 * norms)


def test_what_cannot_be_collected_is_told_before_the_engine_starts(tiny: TinyModel, tmp_path: Path) -> None:
    made = [{"text": "short"}, {"text": words(np.random.default_rng(0), 1200)}]
    path, out = saved(tmp_path / "prompts.jsonl", made), tmp_path / "out"
    long = collect(tiny, path, out)
    assert long.returncode == 2
    assert "prompts.jsonl:2: " in long.stderr
    beyond = collect(tiny, saved(path, made[:1]), out, taps=[Tap(7)])
    assert beyond.returncode == 2
    assert "resid_post.7" in beyond.stderr
    with pytest.raises(StoreError):
        ActivationStore.open(out)
    # The corrected file may go into the same folder: nothing was there yet.
    done = collect(tiny, path, out)
    assert done.returncode == 0, done.stderr
    assert len(ActivationStore.open(out)) == 1
