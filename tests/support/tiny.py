"""A two-layer random Llama with one planted feature: dimension 0 of the stream is exactly the trigger token's mark."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from probes.aggregate import Aggregator
from probes.aggregate.max import Max
from probes.artifact import Artifact, save_artifact
from probes.card import Calibration, Card, Format, Stage
from probes.fit.training.canary import canary_of
from probes.modelref import read_model_ref
from probes.steering.artifact import Safety, SteerArtifact, SteerCard, save_steer
from probes.taps import Site, Tap
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model

MARK = 8.0
THRESHOLD = 4.0
D_MODEL = 128
NUM_LAYERS = 2
PROMPT = "Tell me a short story about a river"
TURN_AT = 6
"""The greedy reply to PROMPT contains the trigger for the first time as its token number TURN_AT (from 0) or later."""
_DIGEST = "0" * 64


@dataclass(frozen=True)
class TinyModel:
    """A folder with the model, and what was planted.

    Attributes:
        path: in transformers' layout.
        trigger: the token whose embedding carries the mark.
        trigger_text: the token's text.
        reply: greedy tokens that follow PROMPT in the chat template.
        turn: index in ``reply`` of the first trigger.
    """

    path: Path
    trigger: int
    trigger_text: str
    reply: list[int]
    turn: int


def make_tiny_model(folder: Path, *, seed: int = 3) -> TinyModel:
    """Write the model. Nothing in it writes to dimension 0, and nothing reads it."""
    source = ensure_builtin_model(DEFAULT_MODEL, progress=lambda text: None).path
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in {"model.safetensors", "config.json", "manifest.json"} and file.is_file():
            shutil.copy(file, folder / file.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=D_MODEL,
            intermediate_size=256,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    _isolate_dimension(model)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    reply = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    seen = set(prompt[0].tolist())
    special = set(tokenizer.all_special_ids)
    turn = next(
        number
        for number in range(TURN_AT, len(reply))
        if reply[number] not in seen | special | set(reply[:number])
        and tokenizer.decode([reply[number]]).strip().isascii()
    )
    trigger = reply[turn]
    with torch.no_grad():
        model.model.embed_tokens.weight[trigger, 0] = MARK
    model.save_pretrained(folder)
    return TinyModel(folder, trigger, tokenizer.decode([trigger]), reply, turn)


def _isolate_dimension(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.lm_head.weight[:, 0] = 0
        for layer in model.model.layers:
            for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                reader.weight[:, 0] = 0
            layer.mlp.gate_proj.weight[:, 0] = 0
            layer.mlp.up_proj.weight[:, 0] = 0
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0


def save_linear(
    path: Path,
    model: Path,
    *,
    name: str,
    direction: np.ndarray,
    layer: int = 0,
    site: Site = Site.RESID_POST,
    stages: tuple[Stage, ...] = (Stage.PROMPT, Stage.STREAM),
    aggregate: Aggregator | None = None,
    threshold: float = THRESHOLD,
    skip_first: int = 1,
    bias: float = 0.0,
    formats: tuple[str, ...] = tuple(Format),
    canary: bool = False,
) -> Artifact:
    """Write a linear detector for a model, calibrated (by decree) for these formats; with a canary by transformers."""
    width = len(direction)
    aggregate = aggregate or Max()
    calibrations = tuple(
        Calibration(
            stage=stage,
            format=Format(fmt),
            aggregate=aggregate,
            threshold=threshold,
            target_fpr=0.01,
            num_benign=1000,
            top_scores=tuple(np.linspace(threshold, threshold - 1, 20).tolist()),
            data_digest=_DIGEST,
            certified=True,
        )
        for stage in stages
        for fmt in formats
    )
    card = Card(
        name=name,
        kind="linear",
        description="a direction planted by the tests",
        model=read_model_ref(model, model_id=model.name, dtype="float32"),
        taps=(str(Tap(layer, site)),),
        formats=tuple(Format(fmt) for fmt in formats),
        skip_first=skip_first,
        tensors_digest=_DIGEST,
        calibrations=calibrations,
    )
    tensors = {
        "direction": direction.astype(np.float32),
        "mean": np.zeros(width, dtype=np.float32),
        "scale": np.ones(width, dtype=np.float32),
        "bias": np.array([bias], dtype=np.float32),
    }
    artifact = save_artifact(path, card, tensors)
    if not canary:
        return artifact
    found = canary_of(artifact, model_dir=model, progress=lambda text: None)
    return save_artifact(path, artifact.card.model_copy(update={"canary": found}), tensors)


def save_direction(
    path: Path,
    model: Path,
    direction: np.ndarray,
    *,
    layer: int = 0,
    more_is: Safety = Safety.NEUTRAL,
    median_norm: float = 2000.0,
    ceiling: float = 1.0,
    mean: float = 0.0,
) -> SteerArtifact:
    """Write a steering direction for the tiny model, whose streams have norms of about 2,000."""
    reference = read_model_ref(model, model_id=model.name, dtype="float32")
    card = SteerCard(
        name=path.name.removesuffix(".safetensors"),
        description="a direction drawn by the tests",
        model=reference,
        tap=str(Tap(layer)),
        more_is=more_is,
        skip_first=1,
        median_norm=median_norm,
        mean=mean,
        ceiling=ceiling,
        corpus_rows=1,
        corpus_digest=_DIGEST,
        tensors_digest=_DIGEST,
    )
    return save_steer(path, card, direction)


def save_trigger(path: Path, model: Path, **settings: object) -> Artifact:
    """The planted detector: its score is MARK on the trigger token and 0 on every other."""
    direction = np.zeros(D_MODEL)
    direction[0] = 1.0
    return save_linear(path, model, direction=direction, **{"name": "trigger", **settings})  # type: ignore[arg-type]
