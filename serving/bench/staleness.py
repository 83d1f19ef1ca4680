"""What ``telltale gate`` says of the shipped detector on changed builds of the embedded model, before and after repair.

``python -m serving.bench.staleness`` writes ``docs/benchmarks/gate.md`` and ``gate.json``. Rows are read from the
pinned packages of the detector's recipe; none of them is written or shown.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer

import probes.packs
import serving
from probes.artifact import Artifact
from probes.cachedir import user_cache_dir
from probes.card import Format, ModelRef, Stage
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.rendered import Rendered
from probes.fit.realign.repair import repair
from probes.fit.realign.ridge import RealignError
from probes.fit.rows.dataset import build_dataset
from probes.fit.rows.example import Example
from probes.fit.rows.ordinary import ordinary_lines
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext
from probes.fit.staleness.check import check, record
from probes.fit.staleness.comparison import Comparison, compare
from probes.fit.staleness.decision import Decision, Margins, decide
from probes.fit.staleness.reference import Reference
from probes.fit.staleness.rows import Rows, read_build
from probes.fit.training.recipe import read_recipe
from probes.modelref import read_model_ref
from probes.speaker import Speaker
from probes.taps import Tap
from serving.bench.rebuilds import Change, low_rank, rebuild, rotated, rounded
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

DETECTOR = "harmful_request"
RANK = 8
SHARES = (0.1, 0.2, 0.3)
"""Of the norm of each matrix: sizes of the low-rank update."""
SEED = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A build, and what is different in it."""

    name: str
    what: str
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is checked, and on what."""

    artifact: Artifact
    folder: Path
    rows: Rows
    texts: Sequence[Example]


class Kept:
    """A reader that keeps what it has read: a detector and its repaired self are scored on the same activations.

    Args:
        reader: of a build.
    """

    def __init__(self, reader: ActivationReader) -> None:
        self._reader = reader
        self._found: dict[tuple[int, ...], Mapping[Tap, npt.NDArray[np.float32]]] = {}

    @property
    def model(self) -> ModelRef:
        """Which build it is."""
        return self._reader.model

    def sink_positions(self, examples: Sequence[Example], text_format: Format) -> int:
        """See ``ActivationReader.sink_positions``."""
        return self._reader.sink_positions(examples, text_format)

    def render(
        self, examples: Sequence[Example], *, text_format: Format, stage: Stage, segments: Collection[Speaker] = ()
    ) -> list[Rendered]:
        """See ``ActivationReader.render``."""
        return self._reader.render(examples, text_format=text_format, stage=stage, segments=segments)

    def sweep(
        self, requests: Sequence[Rendered], taps: Sequence[Tap], *, label: str
    ) -> Iterator[tuple[int, Mapping[Tap, npt.NDArray[np.float32]]]]:
        """See ``ActivationReader.sweep``; always of the same taps."""
        missing = [request for request in requests if request.tokens not in self._found]
        if missing:
            for number, found in self._reader.sweep(missing, taps, label=label):
                self._found[missing[number].tokens] = {tap: rows.copy() for tap, rows in found.items()}
        for number, request in enumerate(requests):
            yield number, self._found[request.tokens]


def main(
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("docs/benchmarks"),
    benign: Annotated[int, typer.Option(min=299, help="Benign rows of the recipe's calibration set.")] = 500,
    texts: Annotated[int, typer.Option(min=100, help="Unlabelled texts to repair with: others of that set.")] = 300,
) -> None:
    """Check, repair and check again on each build."""
    began = time.monotonic()
    subject = _subject(benign, texts)
    reader = _reader(subject, subject.folder)
    reference = record(
        subject.artifact,
        subject.rows,
        reader,
        stage=Stage.PROMPT,
        text_format=Format.CHAT,
        aggregate=None,
        read_by="transformers",
        created_by=f"telltale {serving.__version__}",
    )
    found = [{"name": "as it is", "what": "the recorded build itself", "nats": cross_entropy(subject.folder)}]
    found[0] |= {"checked": _figures(reference.quality, decide(reference.quality, reference.claim, Margins()))}
    with tempfile.TemporaryDirectory() as place:
        for case in _cases(subject):
            say(f"{case.name}: {case.what}")
            folder = rebuild(subject.folder, Path(place) / "build", case.change)
            found.append(_try(case, subject, reference, folder, reader))
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    minutes = (time.monotonic() - began) / 60
    report = {
        "detector": DETECTOR,
        "model": DEFAULT_MODEL,
        "rows": {"positive": int(np.sum(subject.rows.labels == 1)), "benign": int(np.sum(subject.rows.labels == 0))},
        "texts": len(subject.texts),
        "data_digest": subject.rows.digest(),
        "claim": reference.claim.model_dump(),
        "libraries": {name: metadata.version(name) for name in ("numpy", "torch", "transformers")},
        "minutes": round(minutes),
        "builds": found,
    }
    (out / "gate.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "gate.md").write_text(_page(report), encoding="utf-8")
    say(f"wrote {out / 'gate.md'} after {minutes:.0f} minutes")


def cross_entropy(folder: Path) -> float:
    """Nats a token of a model on lines of ordinary text: whether it still works."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for line in ordinary_lines():
            tokens = torch.tensor([tokenizer(line)["input_ids"]])
            told = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
            total -= float(told.gather(1, tokens[0, 1:, None]).sum())
            count += tokens.shape[1] - 1
    return round(total / count, 3)


def _subject(benign: int, texts: int) -> Subject:
    pack = Path(probes.packs.__file__).parent / DEFAULT_MODEL.partition(":")[2]
    recipe = read_recipe(pack / f"{DETECTOR}.recipe.yaml")
    wheels = WheelStore(folder=user_cache_dir() / "wheels", progress=say)
    data = build_dataset(recipe, SourceContext(wheels=wheels, folder=pack, seed=recipe.seed))
    examples = [*data.pairs, *data.hard_benign, *data.calibration[:benign]]
    numbers: dict[str, int] = {}
    return Subject(
        artifact=Artifact.load(pack / f"{DETECTOR}.safetensors"),
        folder=embedded_folder(DEFAULT_MODEL) or Path(DEFAULT_MODEL),
        rows=Rows(
            examples=tuple(examples),
            labels=np.array([example.label for example in examples], dtype=np.int64),
            groups=np.array([numbers.setdefault(example.group, len(numbers)) for example in examples], dtype=np.int64),
        ),
        texts=data.calibration[benign : benign + texts],
    )


def _cases(subject: Subject) -> list[Case]:
    below = subject.artifact.taps[0].layer + 1
    layers = range(below - below // 3, below)
    return [
        Case("bfloat16", "all weights rounded to bfloat16", rounded),
        *(
            Case(
                f"rank {RANK}, {share:g}",
                f"a random rank-{RANK} update of every matrix of the layers {layers[0]} to {layers[-1]}, the last "
                f"third below the tap, of {share:g} of the matrix's norm",
                low_rank(layers, rank=RANK, share=share, seed=SEED),
            )
            for share in SHARES
        ),
        Case(
            "rotated", "the residual stream in another basis, folded into the weights: the same function", rotated(SEED)
        ),
    ]


def _try(case: Case, subject: Subject, reference: Reference, folder: Path, old: Kept) -> dict[str, Any]:
    model = read_model_ref(folder, model_id=case.name, dtype=subject.artifact.card.model.dtype)
    new = _reader(subject, folder)
    report = check(
        subject.artifact,
        reference,
        subject.rows,
        new,
        model=model,
        margins=Margins(),
        read_by="transformers",
        created_by=f"telltale {serving.__version__}",
    )
    figures: dict[str, Any] = {
        "name": case.name,
        "what": case.what,
        "nats": cross_entropy(folder),
        "checked": _figures(report.comparison, report.decision),
    }
    try:
        repaired = repair(
            subject.artifact,
            subject.texts,
            old=old,
            new=new,
            data_digest=reference.data_digest,
            created_by=f"telltale {serving.__version__}",
            progress=say,
        )
    except RealignError as error:
        return figures | {"refused": str(error).partition(": ")[2]}
    calibration = reference.require(subject.artifact, subject.rows)
    readings = read_build(repaired.artifact, subject.rows.examples, new, calibration, label="repaired")
    claim = reference.claim
    again = compare(reference.pairs(readings), confidence=claim.confidence, seed=SEED)
    told = {key: repaired.record[key] for key in ("tokens", "penalties", "r2_activations", "r2_score", "r2_statistics")}
    return figures | {"repaired": _figures(again, decide(again, claim, Margins())), "repair": told}


def _reader(subject: Subject, folder: Path) -> Kept:
    card = subject.artifact.card
    return Kept(
        ActivationReader(
            folder,
            model=read_model_ref(folder, model_id=card.model.id, dtype=card.model.dtype),
            layers=[tap.layer for tap in subject.artifact.taps],
            cache_dir=user_cache_dir(),
            progress=say,
        )
    )


def _figures(found: Comparison, decision: Decision) -> dict[str, Any]:
    return {"verdict": decision.verdict.value, "reasons": decision.reasons, **found.model_dump(mode="json")}


def _page(report: dict[str, Any]) -> str:
    rows, claim = report["rows"], report["claim"]
    libraries = ", ".join(f"{name} {version}" for name, version in report["libraries"].items())
    lines = [
        "# `telltale gate` on changed builds of the embedded model",
        "",
        f"The shipped detector `{report['detector']}` of `{report['model']}`, as chat, at the prompt. Repeat it with",
        "",
        "    python -m serving.bench.staleness",
        "",
        f"({report['minutes']} minutes on two slow cores; {libraries}). Rows: the development pairs and hard benign",
        f"questions of the detector's recipe, and rows of its calibration set: {rows['positive']} positive,",
        f"{rows['benign']} benign. The threshold {claim['thresholds'][0]:.4f} promises a false-alarm rate of",
        f"{claim['target_fpr']:g} at {claim['confidence']:.0%} confidence. Repairs were fitted on",
        f"{report['texts']} other benign texts without labels, in both formats, and are judged on the same rows with",
        "the old threshold.",
        "",
        "| build | nats a token | verdict | AUROC (loss, bounds) | alarms, benign | caught | rank correlation "
        "| after repair | AUROC | alarms, benign | caught | R^2 of score, statistic |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for build in report["builds"]:
        lines.append(
            f"| {build['name']} | {build['nats']:.3f} | {_cells(build['checked'], True)} | {_repaired(build)} |"
        )
    lines += ["", "## The builds", ""]
    for build in report["builds"]:
        lines.append(f"* {build['name']}: {build['what']}.")
        lines += [f"  * {reason}" for reason in build["checked"]["reasons"]]
        lines += [f"  * Repaired: {reason}" for reason in build.get("repaired", {}).get("reasons", [])]
        if "refused" in build:
            lines.append("  * The repair was refused.")
    return "\n".join(lines) + "\n"


def _cells(found: dict[str, Any], with_loss: bool) -> str:
    ranking, benign, positive = found["ranking"], found["benign"], found["positive"]
    loss = ranking["loss"]
    cells = [
        f"**{found['verdict']}**",
        f"{ranking['auroc_after']:.4f}"
        + (f" ({loss['value']:+.4f}, {loss['low']:+.4f} to {loss['high']:+.4f})" if with_loss else ""),
        f"{benign['alarms_after']} of {benign['num']}",
        f"{positive['caught_after']} of {positive['num']}",
    ]
    if with_loss:
        cells.append(f"{found['agreement']['rank_correlation']:.4f}")
    return " | ".join(cells)


def _repaired(build: dict[str, Any]) -> str:
    if "repaired" not in build:
        return ("refused" if "refused" in build else "") + " |  |  |  | "
    told = build["repair"]
    statistic = next(iter(told["r2_statistics"].values()))
    return f"{_cells(build['repaired'], False)} | {told['r2_score']:.3f}, {statistic:.3f}"


if __name__ == "__main__":
    typer.run(main)
