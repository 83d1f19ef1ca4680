"""Write small sparse autoencoders with SAELens itself, beside its own codes and reconstructions of some rows.

They are what `tests/unit/test_sae_layouts.py` holds our loader to. SAELens is no dependency of Telltale; run it in an
environment of its own (sae-lens 6.54 was used):

    python scripts/make_sae_fixtures.py tests/data/saelens
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig, Transcoder, TranscoderConfig
from safetensors.torch import save_file

D_MODEL, WIDTH, ROWS = 16, 24, 24


def fill(sae: torch.nn.Module, seed: int) -> None:
    """Random weights; decoder rows of different lengths, and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name == "threshold":
            value = value.abs()
        parameter.data = (value * (0.3 if name == "r_mag" else 1.0)).to(parameter.dtype)


def save_expected(made: Any, rows: torch.Tensor, target: Path) -> None:
    """What SAELens makes of the rows."""
    with torch.no_grad():
        codes = made.encode(rows)
        expected = {"rows": rows, "codes": codes, "reconstruction": made.decode(codes)}
    save_file({key: value.contiguous() for key, value in expected.items()}, target / "expected.safetensors")


def metadata(hook: str, out: str | None = None) -> SAEMetadata:
    """What SAELens keeps of the model."""
    told = {"model_name": "fake", "hook_name": hook, "dataset_path": "made-up", "hook_head_index": None}
    return SAEMetadata(**told, **({"hook_name_out": out} if out else {}))


def main(folder: Path) -> None:
    """Write one folder for each kind."""
    stream, before = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
    size: dict[str, Any] = {"d_in": D_MODEL, "d_sae": WIDTH}
    crossing = {**size, "d_out": D_MODEL, "apply_b_dec_to_input": False}
    crossing["metadata"] = metadata(before, "blocks.2.hook_mlp_out")
    here: dict[str, Any] = {**size, "metadata": metadata(stream)}
    kinds: dict[str, Callable[[], Any]] = {
        "standard": lambda: StandardSAE(StandardSAEConfig(**here)),
        "standard_no_b_dec": lambda: StandardSAE(StandardSAEConfig(**here, apply_b_dec_to_input=False)),
        "standard_layer_norm": lambda: StandardSAE(StandardSAEConfig(**here, normalize_activations="layer_norm")),
        "gated": lambda: GatedSAE(GatedSAEConfig(**here)),
        "gated_rescaled": lambda: GatedSAE(GatedSAEConfig(**here, normalize_activations="constant_norm_rescale")),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**here)),
        "jumprelu_rescaled": lambda: JumpReLUSAE(
            JumpReLUSAEConfig(**here, normalize_activations="constant_norm_rescale")
        ),
        "topk": lambda: TopKSAE(TopKSAEConfig(**here, k=5)),
        "topk_rescaled_codes": lambda: TopKSAE(TopKSAEConfig(**here, k=5, rescale_acts_by_decoder_norm=True)),
        "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**here, k=5)),
        "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**here, k=5, matryoshka_widths=[8, WIDTH])
        ),
        "transcoder": lambda: Transcoder(TranscoderConfig(**crossing)),
        "jumprelu_transcoder": lambda: JumpReLUTranscoder(JumpReLUTranscoderConfig(**crossing)),
    }
    rows = torch.randn(ROWS, D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    for seed, (name, make) in enumerate(kinds.items(), start=1):
        made = make()
        fill(made, seed)
        target = folder / name
        if isinstance(made, BatchTopKTrainingSAE):
            made.topk_threshold = torch.tensor(4.0, dtype=torch.double)
            # A checkpoint keeps the threshold of training; what it means is what SAELens makes of it for inference.
            checkpoint = folder / f"{name}_checkpoint"
            made.save_model(checkpoint)
            made.save_inference_model(target)
            made = SAE.load_from_disk(target)
            save_expected(made, rows, checkpoint)
        else:
            made.save_model(target)
        save_expected(made, rows, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
