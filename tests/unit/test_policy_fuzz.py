"""Whatever stands in a policy file, it is read or refused with a message: no other exception, no hang."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from ruamel.yaml import YAML

from monitor.yaml_file import PolicyError, read_policy_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/policy.md").read_text()
WHOLE = re.findall(r"```yaml\n(version.*?)```", PAGE, flags=re.DOTALL)
RULES = re.findall(r"```yaml rule\n(.*?)```", PAGE, flags=re.DOTALL)
EXAMPLES = [
    *WHOLE,
    *(f"{WHOLE[0]}      - {rule.strip().replace(chr(10), chr(10) + ' ' * 8)}\n" for rule in RULES),
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(
        ["block", "prompt", "stream", "response", "default", "conversation", "../../etc/passwd", "builtin:"]
    ),
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)


def outcome(text: str) -> str:
    """The message, or nothing if the file is read."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "telltale.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            read_policy_file(path)
        except PolicyError as error:
            assert str(error).startswith(f"{path}")
            return str(error)
        return ""


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            found += places(child, (*at, key))
    return found


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 5
    assert not any(map(outcome, EXAMPLES))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_changed_file_is_read_or_refused(data: st.DataObject) -> None:
    yaml = YAML(typ="safe", pure=True)
    tree = yaml.load(data.draw(st.sampled_from(EXAMPLES)))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places(tree)))
        node = tree
        for key in where[:-1]:
            node = node[key]
        match data.draw(st.sampled_from(["replace", "remove", "add", "copy"])):
            case "replace":
                node[where[-1]] = data.draw(ODD)
            case "remove":
                del node[where[-1]]
            case "add" if isinstance(node, dict):
                node[data.draw(st.text(max_size=6))] = data.draw(ODD)
            case _ if isinstance(node, list):
                node.append(node[where[-1]])
        if not places(tree):
            break
    with TemporaryDirectory() as folder:
        path = Path(folder) / "changed.yaml"
        yaml.dump(tree, path)
        outcome(path.read_text())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_torn_text_is_read_or_refused(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(EXAMPLES))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    outcome(text[:start] + data.draw(st.text(max_size=6)) + text[end:])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "once its aliases are written out"),
        ("a: &a {<<: *a}\n", "cannot be read"),
        ("a: 2020-02-31\n", "cannot be read"),
        (f"a: {'9' * 6000}\n", "cannot be read"),
        ("{a: " * 1500 + "}" * 1500, "nested too deeply"),
        ("a: x\n" * 300_000, "are read"),
        ("a: !!python/object:os.system x\n", "is missing"),
        ("\x00", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
    ],
    ids=["bomb", "merged into itself", "date", "digits", "depth", "size", "tag", "nul", "two documents"],
)
def test_what_was_found_once_stays_refused(text: str, says: str) -> None:
    assert says in outcome(text)
