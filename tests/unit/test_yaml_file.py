"""A policy file is read whole or refused; each mistake is one line with file, line, key and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from monitor.config import DEFAULT_TEXT, Config
from monitor.types import Action, Expose, Mode
from monitor.yaml_file import PolicyError, read_policy_file
from probes.aggregate.ema import Ema
from probes.card import Stage

VALID = """\
version: "1"
model: builtin:smollm2-135m-instruct
detectors:
  - pack: builtin:smollm2-135m-instruct
  - {artifact: detectors/mine.safetensors, name: mine}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    rules:
      - name: refuse-harm
        when: {detector: harm, stage: prompt}
        do: {action: block, text: "No."}
        mode: enforce
      - name: watch
        when: {detector: mine, stage: stream, aggregate: {kind: ema, alpha: 0.3}, above: {value: 2.5}}
        do: {action: flag}
        mode: shadow
reserve: {directions: 8}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "telltale.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(folder: Path, text: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(PolicyError) as caught:
        read_policy_file(write(folder, text))
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def schema_accepts(text: str) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads(json.dumps(YAML(typ="safe").load(text)))
    return bool(jsonschema.Draft202012Validator(Config.model_json_schema()).is_valid(content))


def test_a_valid_file(tmp_path: Path) -> None:
    file = read_policy_file(write(tmp_path, VALID))
    (policy,) = file.config.policies
    assert (policy.on_gap, policy.on_uncalibrated, policy.hold_back) == (Action.BLOCK, Action.FLAG, None)
    assert (policy.expose, policy.text) == (Expose.ACTIONS, DEFAULT_TEXT)
    first, second = policy.rules
    assert (first.when.stage, first.when.aggregate, first.when.above, first.do.text) == (
        Stage.PROMPT,
        None,
        None,
        "No.",
    )
    assert second.when.aggregate == Ema(alpha=0.3)
    assert second.when.above is not None
    assert (second.when.above.value, second.mode, file.config.reserve.directions) == (2.5, Mode.SHADOW, 8)
    assert file.resolve("detectors/mine.safetensors") == tmp_path / "detectors" / "mine.safetensors"


def test_a_later_mistake_knows_its_line(tmp_path: Path) -> None:
    file = read_policy_file(write(tmp_path, VALID))
    error = file.error(("policies", 0, "rules", 1, "when", "detector"), "is 'mine'.")
    assert str(error) == f"{tmp_path}/telltale.yaml:16: policies[0].rules[1].when.detector: is 'mine'."


RULE, WATCH = "policies[0].rules[0]", "policies[0].rules[1]"
BY_SCHEMA = [  # replaced, by what, line, key, words of the message
    ('version: "1"', "version: 1", 1, "version", "is 1. Did you mean '1'?"),
    ("on_gap: block", "on_gp: block", 8, "policies[0].on_gp", "not a key here. Did you mean 'on_gap'? Known: expose"),
    ("    on_gap: block\n", "", 7, "policies[0].on_gap", "is missing. It is: what to do when a position"),
    ("    on_uncalibrated: flag\n", "", 7, "policies[0].on_uncalibrated", "is missing. It is: what to do in a format"),
    ("on_gap: block", "on_gap: blok", 8, "policies[0].on_gap", "is 'blok'. Did you mean 'block'? Known: allow, block,"),
    ("on_gap: block", "on_gap: [block]", 8, "policies[0].on_gap", "is ['block']"),
    ("on_gap: block", "on_gap: block\n    hold_back: 2000", 9, "policies[0].hold_back", "less than or equal to 1024."),
    ("stage: prompt", "stage: promt", 12, f"{RULE}.when.stage", "is 'promt'. Did you mean 'prompt'? Known: prompt,"),
    ("{action: block, text: \"No.\"}", "{action: blocc}", 13, f"{RULE}.do.action", "'block'? Known: block, escalate"),
    ("mode: enforce", "mode: enforced", 14, f"{RULE}.mode", "Did you mean 'enforce'? Known: enforce, shadow."),
    ("        mode: enforce\n", "", 11, f"{RULE}.mode", "is missing."),
    ("name: refuse-harm", "name: Refuse Harm", 11, f"{RULE}.name", "should match pattern"),
    ("alpha: 0.3", "alpha: 1.5", 16, f"{WATCH}.when.aggregate.alpha", "less than or equal to 1. It is: weight"),
    ("alpha: 0.3", "alpa: 0.3", 16, f"{WATCH}.when.aggregate.alpa", "Did you mean 'alpha'? Known: alpha, kind."),
    ("alpha: 0.3", 'alpha: "0.3"', 16, f"{WATCH}.when.aggregate.alpha", "valid number"),
    ("kind: ema", "kind: emma", 16, f"{WATCH}.when.aggregate", "Did you mean 'ema'? Known: after, attention,"),
    ("directions: 8", "directions: 0", 19, "reserve.directions", "greater than or equal to 1. It is: columns per tap."),
    ("directions: 8", "directions: 8.5", 19, "reserve.directions", "valid integer"),
    ("rules:\n", "rules: []\n    rulez:\n", 10, "policies[0].rules", "at least 1 item"),
    ("reserve: ", "reserved: ", 19, "reserved", "Did you mean 'reserve'?"),
]  # fmt: skip
BY_VALIDATOR = [
    ("pack: builtin:smollm2-135m-instruct", "name: x", 4, "detectors[0]", "exactly one of 'pack' and 'artifact'"),
    ("pack: builtin:smollm2-135m-instruct", "{pack: x, artifact: y}", 4, "detectors[0]", "exactly one of"),
    ("pack: builtin:smollm2-135m-instruct", "{pack: x, name: y}", 4, "detectors[0]", "a pack's detectors keep their"),
    ("{value: 2.5}", "{value: 2.5, target_fpr: 0.01}", 16, f"{WATCH}.when.above", "exactly one of"),
    ("{value: 2.5}", "{}", 16, f"{WATCH}.when.above", "exactly one of 'value' and 'target_fpr'"),
    ("{action: flag}", "{action: flag, text: x}", 17, "policies[0].rules[1].do", "route, regenerate, block' alone"),
    ("name: watch", "name: refuse-harm", 7, "policies[0]", "two rules are named 'refuse-harm'"),
    ("name: watch", "name: on_gap", 15, "policies[0].rules[1]", "'on_gap' is what decisions of that policy key"),
    ("name: watch", "name: on_uncalibrated", 15, "policies[0].rules[1]", "choose another name"),
]  # fmt: skip


@pytest.mark.parametrize("case", BY_SCHEMA + BY_VALIDATOR, ids=lambda case: case[1])
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, case: tuple[str, str, int, str, str]) -> None:
    old, new, line, key, message = case
    assert old in VALID
    found = mistakes(tmp_path, VALID.replace(old, new, 1))
    matching = [text for text in found if text.startswith(f"telltale.yaml:{line}: {key}: ")]
    assert matching, found
    assert message in matching[0]
    assert len(found) <= 2, found


@pytest.mark.parametrize(("old", "new"), [case[:2] for case in BY_SCHEMA])
def test_the_schema_refuses_the_same(old: str, new: str) -> None:
    assert schema_accepts(VALID)
    assert not schema_accepts(VALID.replace(old, new, 1))


def test_several_mistakes_stand_in_order(tmp_path: Path) -> None:
    text = (
        VALID.replace("on_gap: block", "on_gap: blok").replace('"1"', '"2"').replace("directions: 8", "directions: -1")
    )
    assert [line.split(": ")[0] for line in mistakes(tmp_path, text)] == [
        "telltale.yaml:1",
        "telltale.yaml:8",
        "telltale.yaml:19",
    ]


@pytest.mark.parametrize("word", [".nan", ".inf", "-.inf", "1e999"])
def test_not_finite_is_refused(tmp_path: Path, word: str) -> None:
    (line,) = mistakes(tmp_path, VALID.replace("value: 2.5", f"value: {word}"))
    assert line.startswith("telltale.yaml:16: policies[0].rules[1].when.above.value: is ")
    assert "finite number" in line


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, VALID.replace("    on_gap: block\n", "    on_gap: block\n    on_gap: allow\n"))
    assert line == "telltale.yaml:9: the key 'on_gap' stands here twice. Keep one of them."


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("version: [\n", "telltale.yaml:2: not YAML: "),
        ('version: "1"\n\tmodel: x\n', "telltale.yaml:2: not YAML: "),
        ("model: *nobody\n", "telltale.yaml:1: not YAML: "),
        ('version: "1"\n---\nversion: "1"\n', "telltale.yaml:2: not YAML: "),
        ("version: \x01\n", "telltale.yaml: not YAML: "),
        ("", "telltale.yaml:1: a policy file is a mapping"),
        ("- version\n", "telltale.yaml:1: a policy file is a mapping"),
        ("just words\n", "telltale.yaml:1: a policy file is a mapping"),
        ('version: "1"\n? [a, b]\n: 1\n', "telltale.yaml:1: the key "),
        ('version: "1"\nreserve: {1: 2}\n', "telltale.yaml:2: reserve: the key 1 is not text"),
        ('version: "1"\nmodel: ' + "[" * 40 + "]" * 40, "telltale.yaml:2: model: is nested too deeply"),
        ('version: "1"\nmodel: &a [*a]\n', "telltale.yaml:1: detectors: is missing"),
    ],
)
def test_what_is_no_policy_is_said_in_one_line(tmp_path: Path, text: str, start: str) -> None:
    assert mistakes(tmp_path, text)[0].startswith(start)


def test_a_key_that_was_merged_in_is_said_where_it_is_used(tmp_path: Path) -> None:
    text = VALID.replace("version:", "base: &base {namee: x}\nversion:").replace("  - name: default", "  - <<: *base")
    assert any(
        line.startswith("telltale.yaml:8: policies[0].namee: 'namee' is not a key") for line in mistakes(tmp_path, text)
    )


def test_a_long_value_is_not_printed_whole(tmp_path: Path) -> None:
    for line in mistakes(tmp_path, VALID.replace("policies:\n  - name", "policies:\n    name")):
        assert len(line) < 400


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        read_policy_file(tmp_path / "none.yaml")
    with pytest.raises(PolicyError, match="cannot be read"):
        read_policy_file(tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes("text: \xe9".encode("latin-1"))
    with pytest.raises(PolicyError, match="is not UTF-8 text"):
        read_policy_file(path)


def test_nothing_is_converted_silently(tmp_path: Path) -> None:
    """Strict: a number in quotes is text, yes is text, a date is no version."""
    for old, new in (("directions: 8", 'directions: "8"'), ("on_gap: block", "on_gap: yes"), ('"1"', "2024-01-01")):
        assert mistakes(tmp_path, VALID.replace(old, new, 1))
