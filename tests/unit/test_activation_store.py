"""A folder of activations: what is written is read, wherever a run was interrupted, and damage is told by its file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.card import Format
from probes.errors import TelltaleError
from probes.fit.reading.activation_manifest import Manifest, StoreError, TokenPositions
from probes.fit.reading.activation_store import ActivationStore
from probes.fit.reading.activation_writer import ActivationWriter, ShardBuffer, shards_of
from probes.taps import Site, Tap
from tests.unit.artifacts import model_ref
from tests.unit.collected import ROLES, TAPS, activations, requests, settings, write

COUNT = 30


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    write(folder, requests(COUNT), settings(COUNT))
    return folder


def test_what_was_written_is_read(whole: Path) -> None:
    store = ActivationStore.open(whole, model=model_ref(id="another name is no other model"))
    assert len(store) == COUNT
    assert len(store.shards) > 3
    assert store.taps == (Tap(0), Tap(2, Site.MLP_OUT))
    for number, (made, found) in enumerate(zip(requests(COUNT), store, strict=True)):
        assert found.record == made.record == store[number].record
        np.testing.assert_array_equal(found.tokens, made.tokens[made.first : made.stop])
        np.testing.assert_array_equal(found.positions, np.arange(made.first, made.stop))
        np.testing.assert_array_equal(found.roles, made.roles[made.first : made.stop])
        for tap in store.taps:
            expected = activations(made, str(tap))[made.first : made.stop]
            np.testing.assert_array_equal(found.at(tap), expected)
            np.testing.assert_array_equal(store[number].at(tap), expected)


def test_a_request_is_a_view_of_its_file(whole: Path) -> None:
    store = ActivationStore.open(whole)
    request, tap = store[COUNT // 2], store.taps[0]
    rows = request.at(tap)
    assert any(np.shares_memory(rows, shard.tensors[str(tap)]) for shard in store.shards)
    assert isinstance(rows, np.memmap)
    assert rows.dtype == np.float32
    assert not rows.flags.writeable


def test_sinks_and_replies_are_marked(tmp_path: Path) -> None:
    made = requests(COUNT)
    write(tmp_path, made, settings(COUNT))
    store = ActivationStore.open(tmp_path)
    assert store.manifest.skip_first == 1  # some shard found one
    for request in store:
        assert request.is_sink.tolist() == [position < 1 for position in request.positions]
        assert not request.is_response.any()


def test_other_requests_are_an_index_error(whole: Path) -> None:
    store = ActivationStore.open(whole)
    for number in (-1, COUNT):
        with pytest.raises(IndexError, match=str(number)):
            store[number]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(1, 60),
    st.integers(100, 4000),
)
def test_shards_hold_every_request_in_order_within_their_limits(lengths: list[int], tokens: int, size: int) -> None:
    chosen = settings(len(lengths), shard_tokens=tokens, shard_bytes=size)
    made = requests(len(lengths))
    shards = list(shards_of(iter(made), chosen))
    assert [request for shard in shards for request in shard] == made
    for shard in shards:
        buffer = ShardBuffer(shard, chosen)
        nbytes = sum(tensor.nbytes for tensor in buffer.tensors().values()) - buffer.offsets.nbytes
        assert len(shard) == 1 or nbytes <= size
        assert len(shard) == 1 or sum(len(request.tokens) for request in shard) <= tokens


@pytest.mark.parametrize("shards", [0, 1, 2, 4])
def test_an_interrupted_run_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path, shards: int) -> None:
    write(tmp_path, requests(COUNT), settings(COUNT), shards=shards)
    with pytest.raises(StoreError, match=r"Run the same telltale collect again"):
        ActivationStore.open(tmp_path)
    # Killed while the next shard was written, and between its files and the manifest.
    (tmp_path / f"shard-{shards:05d}.safetensors.partial").write_bytes(b"half of it")
    (tmp_path / "manifest.json.partial").write_bytes(b"{")
    if shards:
        (tmp_path / f"shard-{shards:05d}.jsonl").write_bytes(b"of another run\n")
    write(tmp_path, requests(COUNT), settings(COUNT))
    assert contents(tmp_path) == contents(whole)


def test_a_complete_folder_stays_as_it_is(whole: Path) -> None:
    before = contents(whole)
    with ActivationWriter(whole, settings(COUNT), roles=ROLES) as writer:
        assert writer.manifest.complete
    assert contents(whole) == before


CHANGES: dict[str, Any] = {
    "taps": ("resid_post.1",),
    "format": Format.RAW,
    "positions": TokenPositions.ALL,
    "input_digest": "1" * 64,
    "shard_tokens": 41,
    "shard_bytes": 1 << 21,
    "engine": {"max_num_seqs": 5},
    "created_by": "another version",
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_by_their_name(whole: Path, name: str) -> None:
    before = contents(whole)
    with pytest.raises(StoreError, match=f"{name} was .* is .*name another folder"):
        ActivationWriter(whole, settings(COUNT, **{name: CHANGES[name]}), roles=ROLES)
    assert contents(whole) == before


def test_another_model_is_refused_by_what_differs(whole: Path) -> None:
    other = model_ref(weight_digest="d" * 64)
    with pytest.raises(StoreError, match="the model differs in weight_digest"):
        ActivationWriter(whole, settings(COUNT, model=other), roles=ROLES)
    with pytest.raises(StoreError, match=r"differ in weight_digest\. Collect again"):
        ActivationStore.open(whole, model=other)


def test_a_run_without_a_shard_may_be_begun_anew(tmp_path: Path) -> None:
    write(tmp_path, requests(COUNT), settings(COUNT, input_digest="1" * 64), shards=0)
    write(tmp_path, requests(COUNT), settings(COUNT))
    assert len(ActivationStore.open(tmp_path)) == COUNT


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"thesis\.txt"):
        ActivationWriter(tmp_path, settings(COUNT), roles=ROLES)
    with pytest.raises(StoreError, match="no folder can be made"):
        ActivationWriter(tmp_path / "thesis.txt" / "out", settings(COUNT), roles=ROLES)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        ActivationWriter(tmp_path, settings(COUNT), roles=ROLES),
        pytest.raises(StoreError, match="another telltale collect is writing"),
    ):
        ActivationWriter(tmp_path, settings(COUNT), roles=ROLES)
    write(tmp_path, requests(COUNT), settings(COUNT))


def test_a_missing_request_is_no_complete_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{COUNT - 1} requests were written, the input has {COUNT}"):
        write(tmp_path, requests(COUNT)[:-1], settings(COUNT))
    assert not Manifest.read(tmp_path).complete


def copied(whole: Path, folder: Path) -> Path:
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00001.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(whole: Path, tmp_path: Path, name: str, damage: str) -> None:
    path = copied(whole, tmp_path) / name
    data = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        case "cut":
            path.write_bytes(data[:-1])
        case "remove":
            path.unlink()
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        ActivationStore.open(tmp_path)
    # Going on would build on it.
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        ActivationWriter(tmp_path, settings(COUNT), roles=ROLES)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x0b\0\0\0\0\0\0\0{"a":{"b":1}'],
    ids=["empty", "short", "long header", "no object", "no tensor"],
)
def test_what_is_no_shard_is_told_without_digests_too(whole: Path, tmp_path: Path, data: bytes) -> None:
    (copied(whole, tmp_path) / "shard-00000.safetensors").write_bytes(data)
    store = ActivationStore.open(tmp_path, verify=False)
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors: not a shard"):
        store[0]


def test_a_missing_tap_is_told_with_those_that_are_there(whole: Path) -> None:
    with pytest.raises(StoreError, match=rf"'resid_post\.1' was not collected.*{TAPS[0]}"):
        ActivationStore.open(whole)[0].at(Tap(1))


@pytest.mark.parametrize(
    "text", ["", "{", "{}", '{"format_version": 2}', json.dumps({"format_version": 1, "unknown": 0})]
)
def test_a_damaged_manifest_is_told(whole: Path, tmp_path: Path, text: str) -> None:
    (copied(whole, tmp_path) / "manifest.json").write_text(text)
    with pytest.raises(TelltaleError, match=r"manifest\.json"):
        ActivationStore.open(tmp_path)


def test_a_folder_without_a_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Name a folder that telltale collect wrote"):
        ActivationStore.open(tmp_path)


def test_reading_needs_no_torch() -> None:
    program = (
        "import sys, probes.fit.reading.activation_store, probes.fit.reading.activation_writer;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
