"""Turns a Llama GGUF file into a float32 model folder that transformers and vLLM load; knows nothing of caches.

It needs numpy, safetensors, `gguf` and `tokenizers`, and neither torch nor transformers: it reads the quantised blocks,
multiplies them out, undoes llama.cpp's reordering of the query and key rows, and writes the tokenizer from the file's
own vocabulary. The same input gives the same bytes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["ConversionError", "convert_llama_gguf"]

FloatArray = npt.NDArray[np.float32]

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class ConversionError(TelltaleError, ValueError):
    """The GGUF file holds something that this converter was not written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """The part of a GGUF header that a Llama config and its tokenizer need."""

    num_layers: int
    context_tokens: int
    d_model: int
    d_mlp: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    norm_eps: float
    tokens: list[str]
    merges: list[str]
    control_ids: list[int]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    chat_template: str


def convert_llama_gguf(source: Path, target: Path, *, progress: Callable[[str], None]) -> None:
    """Write the model folder for `source` into the existing, empty folder `target`.

    Args:
        source: a GGUF file of architecture `llama` with a byte-level BPE tokenizer of the SmolLM kind.
        target: where model.safetensors, config.json, the tokenizer and its chat template go.
        progress: told what is being done, in one line each time.

    Raises: ConversionError for another architecture or tokenizer, or a missing library.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(
            f"convert {source.name}: the library '{error.name}' is missing; it reads the embedded model's weights. "
            "Install Telltale with its 'cpu' extra (`make install`)."
        ) from error
    reader = GGUFReader(str(source))
    header = _read_header(reader, source)
    tensors = _dequantise(reader, header, source, progress)
    progress("writing the weights")
    _write_weights(tensors, target / "model.safetensors")
    progress("writing the tokenizer and the configuration")
    _write_tokenizer(header, target)
    tied = "lm_head.weight" not in tensors
    _write_json(target / "config.json", _model_config(header, tied=tied))
    _write_json(
        target / "generation_config.json",
        {"bos_token_id": header.bos_id, "eos_token_id": header.eos_id, "pad_token_id": header.pad_id},
    )


def _read_header(reader: "GGUFReader", source: Path) -> _Header:
    def field(key: str) -> Any:
        entry = reader.get_field(key)
        if entry is None:
            raise ConversionError(
                f"{source}: the header has no field '{key}', which a Llama model file must have. "
                "The file is cut off or of another kind; install it again."
            )
        return entry.contents()

    def require(key: str, allowed: str) -> None:
        found = field(key)
        if found != allowed:
            raise ConversionError(
                f"{source}: {key} is '{found}'; only '{allowed}' can be converted here. "
                "Convert the model to a transformers folder by other means and pass that folder to `telltale serve`."
            )

    require("general.architecture", "llama")
    require("tokenizer.ggml.model", "gpt2")
    require("tokenizer.ggml.pre", "smollm")
    token_types: list[int] = field("tokenizer.ggml.token_type")
    # The file keeps float32; its shortest decimal is the number that was meant (1e-05, not 9.99999975e-06).
    return _Header(
        num_layers=int(field("llama.block_count")),
        context_tokens=int(field("llama.context_length")),
        d_model=int(field("llama.embedding_length")),
        d_mlp=int(field("llama.feed_forward_length")),
        num_heads=int(field("llama.attention.head_count")),
        num_kv_heads=int(field("llama.attention.head_count_kv")),
        rope_theta=float(str(np.float32(field("llama.rope.freq_base")))),
        norm_eps=float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        tokens=field("tokenizer.ggml.tokens"),
        merges=field("tokenizer.ggml.merges"),
        control_ids=[index for index, kind in enumerate(token_types) if kind == _CONTROL_TOKEN],
        bos_id=int(field("tokenizer.ggml.bos_token_id")),
        eos_id=int(field("tokenizer.ggml.eos_token_id")),
        unk_id=int(field("tokenizer.ggml.unknown_token_id")),
        pad_id=int(field("tokenizer.ggml.padding_token_id")),
        chat_template=str(field("tokenizer.chat_template")),
    )


def _dequantise(
    reader: "GGUFReader", header: _Header, source: Path, progress: Callable[[str], None]
) -> dict[str, FloatArray]:
    from gguf import dequantize

    tensors: dict[str, FloatArray] = {}
    total = len(reader.tensors)
    for index, tensor in enumerate(reader.tensors):
        if index % 30 == 0:
            progress(f"expanding the weights to float32 ({100 * index // total} %)")
        name = _transformers_name(tensor.name, source)
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if ".attn_q." in tensor.name:
            values = _undo_rope_order(values, header.num_heads)
        elif ".attn_k." in tensor.name:
            values = _undo_rope_order(values, header.num_kv_heads)
        tensors[name] = np.ascontiguousarray(values)
    expected = 2 + len(_LAYER_TENSORS) * header.num_layers
    found = len(tensors) - ("lm_head.weight" in tensors)
    if found != expected:
        raise ConversionError(
            f"{source}: {found} tensors, but a Llama model of {header.num_layers} layers has {expected}. "
            "The file is cut off; install it again."
        )
    return tensors


def _undo_rope_order(values: FloatArray, num_heads: int) -> FloatArray:
    """Rows of a head from llama.cpp's order (pairs side by side) back to transformers' (halves)."""
    rows, columns = values.shape
    return values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _transformers_name(name: str, source: Path) -> str:
    parts = name.split(".")
    match parts:
        case ["blk", layer, kind, "weight"] if kind in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.weight"
        case [kind, "weight"] if kind in _MODEL_TENSORS:
            return f"{_MODEL_TENSORS[kind]}.weight"
        case _:
            raise ConversionError(
                f"{source}: the tensor '{name}' has no counterpart in a Llama model. Allowed are the weights of "
                f"{', '.join(sorted([*_LAYER_TENSORS, *_MODEL_TENSORS]))}. Use an unmodified Llama GGUF file."
            )


def _write_weights(tensors: Mapping[str, FloatArray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), str(path), metadata={"format": "pt"})


def _write_tokenizer(header: _Header, target: Path) -> None:
    # SmolLM splits digits one by one before GPT-2's byte-level pattern; no post-processor: the template writes markers.
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(header.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in header.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(header.tokens[index], normalized=False, special=True) for index in header.control_ids]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "chat_template.jinja").write_text(header.chat_template, encoding="utf-8")
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": header.context_tokens,
            "bos_token": header.tokens[header.bos_id],
            "eos_token": header.tokens[header.eos_id],
            "unk_token": header.tokens[header.unk_id],
            "pad_token": header.tokens[header.pad_id],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        },
    )


def _model_config(header: _Header, *, tied: bool) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(header.tokens),
        "hidden_size": header.d_model,
        "intermediate_size": header.d_mlp,
        "num_hidden_layers": header.num_layers,
        "num_attention_heads": header.num_heads,
        "num_key_value_heads": header.num_kv_heads,
        "head_dim": header.d_model // header.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": header.context_tokens,
        "rms_norm_eps": header.norm_eps,
        "rope_theta": header.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": header.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": header.bos_id,
        "eos_token_id": header.eos_id,
        "pad_token_id": header.pad_id,
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
