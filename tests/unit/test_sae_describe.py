"""Latents are described by what they were planted on; controls that cut the link find nothing."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import fisher_exact
from typer.testing import CliRunner

from probes.artifact import ArtifactError
from probes.card import Format
from probes.errors import TelltaleError
from probes.fit.rows.example import Example
from probes.sae.describe.browser import write_browser
from probes.sae.describe.codes import Codes, CodesError, read_codes
from probes.sae.describe.contexts import pick_contexts
from probes.sae.describe.corpus import Corpus, CorpusError, cut_documents, cut_windows, whole_requests
from probes.sae.describe.describe import Describing, describe
from probes.sae.describe.description import Description, DescriptionError, load_description
from probes.sae.describe.enrichment import enrich
from probes.sae.describe.labeller import LabellerError, OpenAiLabeller, evidence_text
from probes.sae.describe.output_tokens import output_tokens
from probes.sae.describe.random_directions import draw_random_directions
from probes.sae.describe.reading import open_sae_reader, read_requests, text_corpus
from probes.sae.describe.token_label import LabelMaker
from probes.sae.file import SaeFile
from probes.taps import Tap
from serving.cli import app
from tests.support.planted_sae import PLANTED, planted_sae, sentences
from tests.support.words import WORDS, make_word_model

HOSTILE = "</script><script>alert(1)</script>"


def corpus(model_dir: Path, count: int) -> Corpus:
    return text_corpus(model_dir, rows(count, 1), max_tokens=100_000)


def rows(count: int, seed: int, word: str | None = None) -> list[Example]:
    return [
        Example(text=text, label=int(word in text.split()) if word else 0, source="s", group=str(number))
        for number, text in enumerate(sentences(count, seed))
    ]


@pytest.fixture(scope="module")
def sae(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SaeFile:
    return planted_sae(model_dir, tmp_path_factory.mktemp("sae") / "planted.safetensors")


@pytest.fixture(scope="module")
def how(model_dir: Path) -> Describing:
    return Describing(
        model_dir=model_dir,
        model_id="words",
        corpus_name="sentences",
        progress=lambda _: None,
        window=8,
        text_format=Format.RAW,
    )


@pytest.fixture(scope="module")
def found(sae: SaeFile, how: Describing) -> Description:
    return describe(sae, corpus(how.model_dir, 300), {"money": rows(80, 2, "money")}, how)


def test_each_planted_word_becomes_the_label_and_the_label_foretells_the_latent(found: Description) -> None:
    for latent, word in zip(found.latents, PLANTED, strict=False):
        assert latent.label == (word,)
        assert latent.by_pmi[0].text == word
        assert latent.score is not None
        assert latent.score.held_out > 0.95
        assert all(context.tokens[context.marked] == word for context in latent.contexts)
        assert latent.density == pytest.approx(1 / len(WORDS), abs=0.01)


def test_a_latent_that_is_never_active_has_no_label_and_no_contexts(found: Description) -> None:
    dead = found.latents[-1]
    assert (dead.density, dead.label, dead.score, dead.contexts) == (0.0, (), None, ())


def test_controls_that_cut_the_link_with_the_tokens_are_at_chance(found: Description) -> None:
    own, others, shifted, _ = found.controls
    assert own.median is not None
    assert own.median > 0.95
    for control in (others, shifted):
        assert control.median is None or abs(control.median - 0.5) < 0.1


def test_the_set_of_the_planted_word_is_enriched_in_its_latent_alone(found: Description) -> None:
    by_word = dict(zip(PLANTED, found.latents, strict=False))
    (entry,) = by_word["money"].enriched
    assert entry.set == "money"
    assert entry.negatives == 0
    assert entry.odds_ratio > 50
    assert not by_word["party"].enriched


def test_another_model_is_refused(sae: SaeFile, how: Describing, tmp_path: Path) -> None:
    other = make_word_model(tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    with pytest.raises(ArtifactError, match="tokenizer_digest"):
        describe(sae, corpus(how.model_dir, 10), {}, replace(how, model_dir=other))


def test_too_few_texts_are_refused(model_dir: Path) -> None:
    with pytest.raises(CorpusError, match="has 3 texts"):
        corpus(model_dir, 3)


def test_no_text_is_begun_beyond_the_limit(model_dir: Path) -> None:
    cut = text_corpus(model_dir, rows(50, 1), max_tokens=200, piece_tokens=10)
    assert all(8 <= len(piece.tokens) <= 10 for piece in cut.pieces)
    assert 200 <= sum(len(piece.tokens) for piece in cut.pieces) < 225
    whole = whole_requests(cut.pieces, max_tokens=100, digest=cut.digest)
    assert whole.pieces == cut.pieces[: len(whole.pieces)]
    assert 100 <= sum(len(piece.tokens) for piece in whole.pieces) < 110


def test_codes_are_those_of_the_sae_one_request_at_a_time(sae: SaeFile, model_dir: Path) -> None:
    reader = open_sae_reader(sae, model_dir, model_id="words", progress=lambda _: None)
    requests = read_requests(reader, rows(7, 3), Format.RAW)
    codes = read_codes([sae.sae()], reader, requests, skip_first=1, label="x")[0]
    for number, request in enumerate(requests):
        whole = sae.sae().encode(reader.stream(request.tokens)[0][1:])
        own = slice(codes.offsets[number], codes.offsets[number + 1])
        np.testing.assert_allclose(codes.matrix[own].toarray(), whole, atol=1e-5)
        np.testing.assert_allclose(codes.means()[number], whole.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(codes.maxima()[number], whole.max(axis=0), atol=1e-5)
        assert codes.tokens[own].tolist() == list(request.tokens[1:])


def test_nothing_is_active_on_a_row_with_a_sinks_norm(sae: SaeFile, model_dir: Path) -> None:
    reader = open_sae_reader(sae, model_dir, model_id="words", progress=lambda _: None)
    requests = read_requests(reader, rows(7, 3), Format.RAW)
    norms = np.concatenate([np.linalg.norm(reader.stream(request.tokens)[0][1:], axis=1) for request in requests])
    limit = float(np.median(norms))
    all_rows = read_codes([sae.sae()], reader, requests, skip_first=1, label="x")[0].matrix.toarray()
    cut = read_codes([sae.sae()], reader, requests, skip_first=1, label="x", max_norm=limit)[0].matrix.toarray()
    np.testing.assert_array_equal(cut[norms <= limit], all_rows[norms <= limit])
    assert not cut[norms > limit * 1.0001].any()
    assert all_rows[norms > limit * 1.0001].any()


def test_codes_that_are_not_finite_are_refused(sae: SaeFile, model_dir: Path) -> None:
    class Broken:
        tap = Tap(0)
        width = 3

        def encode(self, rows: np.ndarray) -> np.ndarray:
            return np.full((len(rows), 3), np.nan, dtype=np.float32)

    reader = open_sae_reader(sae, model_dir, model_id="words", progress=lambda _: None)
    with pytest.raises(CodesError, match="NaN"):
        read_codes([Broken()], reader, read_requests(reader, rows(2, 3), Format.RAW), skip_first=1, label="x")


def test_no_document_stands_in_both_halves() -> None:
    cut = cut_documents([list(range(100))] * 9, piece_tokens=16, max_tokens=10_000, digest="0" * 64)
    held = cut.halves(0)
    assert held.any()
    assert not set(cut.document[held]) & set(cut.document[~held])
    offsets = np.concatenate([[0], np.cumsum([len(piece.tokens) for piece in cut.pieces])])
    windows = cut_windows(offsets, held, width=5)
    request = np.repeat(np.arange(len(cut.pieces)), np.diff(offsets))
    for window in range(len(windows)):
        inside = np.flatnonzero(windows.of_row == window)
        assert 1 <= len(inside) <= 5
        assert len(set(request[inside])) == 1
        assert held[request[inside[0]]] == windows.held_out[window]
        assert windows.whole[window] == (len(inside) == 5)


def test_the_shift_keeps_how_often_and_in_which_half() -> None:
    generator = np.random.default_rng(0)
    held = np.repeat([False, True, False, True], 50)
    maker = LabelMaker(generator.integers(0, 9, 200), cut_windows(np.arange(0, 201, 50), held[::50], width=10))
    active = np.flatnonzero(generator.random(200) < 0.1)
    moved = maker.shifted(active, generator)
    assert held[moved].sum() == held[active].sum()
    assert len(set(moved)) == len(active)
    assert set(moved) != set(active)


def test_enrichment_is_fishers_exact_test() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random(60) < 0.4).astype(np.int64)
    active = generator.random((60, 25)) < 0.3
    active[:, 0] = labels == 1
    result = enrich(active, labels)
    for latent in range(25):
        table = [
            [int((active[:, latent] & (labels == label)).sum()), int((~active[:, latent] & (labels == label)).sum())]
            for label in (1, 0)
        ]
        assert result.p[latent] == pytest.approx(fisher_exact(table, alternative="greater").pvalue, rel=1e-9)
    assert result.q[0] < 1e-10
    assert (result.q >= result.p).all()


def test_random_directions_are_active_as_often_as_asked() -> None:
    sample = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    density = np.array([0.0, 0.001, 0.02, 0.5])
    drawn = draw_random_directions(Tap(3), sample, density, seed=1)
    np.testing.assert_allclose((drawn.encode(sample) > 0).mean(axis=0), density, atol=1 / 4000)


def test_output_tokens_are_the_ends_of_the_logits() -> None:
    generator = np.random.default_rng(0)
    decoder, unembedding = generator.normal(size=(200, 8)), generator.normal(size=(50, 8))
    for row, spoken in zip(
        decoder, output_tokens(decoder.astype(np.float32), unembedding.astype(np.float32), count=4), strict=True
    ):
        order = np.argsort(unembedding @ row)
        assert spoken.promoted == tuple(order[::-1][:4])
        assert spoken.suppressed == tuple(order[:4])


def test_contexts_stay_inside_their_request_and_mark_its_peak() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random((90, 1)).astype(np.float32) * (generator.random((90, 1)) < 0.3)
    codes = Codes(csr_array(dense.astype(np.float32)), np.arange(90), np.arange(0, 91, 9))
    turned = codes.by_latent()
    request = codes.request_of_row()
    picked = pick_contexts(
        codes, turned.indices.astype(np.int64), turned.data, request, per_quantile=(1, 1, 2), generator=generator
    )
    assert [context.quantile for context in picked] == sorted((c.quantile for c in picked), reverse=True)
    for context in picked:
        assert len({int(request[token]) for token in context.tokens}) == 1
        assert context.activity[context.marked] == max(context.activity)


class Text(HTMLParser):
    """The scripts and the visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_escape_every_text_and_fetch_nothing(found: Description, tmp_path: Path) -> None:
    latent = found.latents[0].model_copy(
        update={
            "named": HOSTILE,
            "label": (HOSTILE,),
            "promoted": (HOSTILE,),
            "contexts": (
                found.latents[0].contexts[0].model_copy(update={"tokens": (HOSTILE, "x"), "activity": (1.0, 0.0)}),
            ),
        }
    )
    many = tuple(latent.model_copy(update={"latent": number}) for number in range(130))
    index = write_browser(tmp_path, found.model_copy(update={"latents": many, "sae": HOSTILE}))
    pages = [index, *sorted((tmp_path / "latents").glob("*.html"))]
    assert len(pages) == 4
    for page in pages:
        parsed = Text()
        parsed.feed(page.read_text(encoding="utf-8"))
        assert HOSTILE in parsed.text
        assert parsed.scripts == (1 if page == index else 0)
        for link in parsed.links:
            assert (page.parent / link.partition("#")[0]).is_file()
            anchor = link.partition("#")[2]
            assert not anchor or f'id="{anchor}"' in (page.parent / link.partition("#")[0]).read_text()
    assert not re.search(r"https?:", index.read_text(encoding="utf-8"))


def test_a_description_comes_back_as_it_was_written(found: Description, tmp_path: Path) -> None:
    write_browser(tmp_path, found)
    assert load_description(tmp_path) == found
    (tmp_path / "description.json").write_text('{"sae": 1}')
    with pytest.raises(DescriptionError, match="telltale sae describe"):
        load_description(tmp_path)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers as OpenAI does, with what it was asked counted; an error for the model 'broken'."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            message = {"role": "assistant", "content": f" words about\n{len(asked)} "}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            answer["choices"] = [choice]
            wrong = body["model"] == "broken"
            data = json.dumps({"error": {"message": "no such model"}} if wrong else answer).encode()
            self.send_response(404 if wrong else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    http.server_close()
    thread.join()


def test_an_external_labeller_names_the_best_latents_and_nobody_else_is_asked(
    sae: SaeFile, how: Describing, found: Description, server: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = server
    named = describe(sae, corpus(how.model_dir, 300), {}, replace(how, labeller=OpenAiLabeller(url, "m"), named=2))
    assert sorted(latent.named for latent in named.latents if latent.named) == ["words about 1", "words about 2"]
    assert len(asked) == 2
    shown = asked[0]["messages"][1]["content"]
    chosen = next(latent for latent in named.latents if latent.named == "words about 1")
    assert shown == evidence_text(chosen)
    assert f"<<{chosen.label[0]}>>" in shown
    assert [latent.score for latent in named.latents] == [latent.score for latent in found.latents]
    with pytest.raises(LabellerError, match="no such model"):
        OpenAiLabeller(url, "broken").name(chosen)


def test_the_command_writes_pages_and_prints_the_controls(sae: SaeFile, model_dir: Path, tmp_path: Path) -> None:
    texts, labelled = tmp_path / "texts.jsonl", tmp_path / "rich.jsonl"
    texts.write_text("".join(json.dumps({"text": row.text}) + "\n" for row in rows(200, 1)))
    labelled.write_text(
        "".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows(40, 2, "money"))
    )
    command = ["sae", "describe", str(sae.path), "--model", str(model_dir), "--corpus", str(texts)]
    command += ["--labelled", str(labelled), "--format", "raw", "--out", str(tmp_path / "pages")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    described = load_description(tmp_path / "pages")
    assert described.labelled_sets == ("rich",)
    assert described.latents[PLANTED.index("money")].enriched
    assert all(control.name in result.stdout for control in described.controls)
    assert (tmp_path / "pages" / "index.html").is_file()
    for options, message in (
        (["--labeller", "http://localhost:1/v1"], "stand together"),
        (["--corpus", "sae.yaml"], "either texts"),
        (["--format", "rawer"], "Did you mean 'raw'"),
        (["--labelled", "code_snippetz"], "code_snippets"),
    ):
        with pytest.raises(TelltaleError, match=message):
            CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
