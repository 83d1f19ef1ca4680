import hashlib
import json
import os
from pathlib import Path

import pytest

from probes import artifact, modelref
from probes.card import ModelRef
from probes.modelref import ModelRefError, chat_template_of, read_model_ref


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": 2}))
    (path / "b.safetensors").write_bytes(b"bb")
    (path / "a.safetensors").write_bytes(b"aa")
    (path / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def read(folder: Path, **options: str) -> ModelRef:
    return read_model_ref(folder, model_id="m", dtype="float32", cache_dir=folder.parent / "cache", **options)


def test_digests_are_over_sorted_names_and_contents(folder: Path) -> None:
    found = read(folder)
    lines = [f"{name}.safetensors {hashlib.sha256(name.encode() * 2).hexdigest()}\n" for name in "ab"]
    assert found.weight_digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert found.chat_template_digest == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert (found.d_model, found.num_layers, found.dtype) == (8, 2, "float32")


def test_other_places_of_width_and_depth(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"text_config": {"n_embd": 4, "n_layer": 3}}))
    assert (read(folder).d_model, read(folder).num_layers) == (4, 3)


def test_bin_files_count_where_there_is_no_safetensors(folder: Path) -> None:
    before = read(folder).weight_digest
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert read(folder).weight_digest != before


def test_tokenizer_config_does_not_change_the_digest_but_its_template_counts(folder: Path) -> None:
    before = read(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    assert read(folder) == before
    (folder / "chat_template.jinja").unlink()
    assert chat_template_of(folder) == "other"
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template_of(folder) == "y"
    (folder / "tokenizer_config.json").unlink()
    assert read(folder).chat_template_digest == hashlib.sha256(b"").hexdigest()
    assert read(folder, chat_template="given").chat_template_digest == hashlib.sha256(b"given").hexdigest()


def test_second_call_reads_no_weights_and_a_change_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(folder)
    calls: list[Path] = []
    real = artifact.sha256_file

    def counted(path: Path) -> str:
        calls.append(path)
        return real(path)

    monkeypatch.setattr(modelref, "sha256_file", counted)
    assert read(folder) == first
    assert calls == []
    (folder / "a.safetensors").write_bytes(b"AA")
    os.utime(folder / "a.safetensors", ns=(1, 1))
    assert read(folder).weight_digest != first.weight_digest
    assert [path.name for path in calls] == ["a.safetensors"]


def test_a_damaged_or_unwritable_cache_costs_time_only(folder: Path) -> None:
    first = read(folder)
    for entry in (folder.parent / "cache" / "digests").iterdir():
        entry.write_text("{")
    assert read(folder) == first
    blocked = folder.parent / "file"
    blocked.write_text("")
    assert read_model_ref(folder, model_id="m", dtype="float32", cache_dir=blocked) == first


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / "pytorch_model.bin"]], "holds no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda f: (f / "config.json").unlink(), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "not an object"),
        (lambda f: (f / "config.json").write_text("{}"), "hidden_size"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "not UTF-8"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, break_it: object, message: str) -> None:
    assert callable(break_it)
    break_it(folder)
    with pytest.raises(ModelRefError, match=message):
        read(folder)


def test_a_model_id_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelRefError, match="is not a folder"):
        read_model_ref(tmp_path / "none", model_id="m", dtype="float32")
