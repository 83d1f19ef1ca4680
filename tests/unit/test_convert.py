"""From a GGUF file to a model folder, on a Llama small enough to write here."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFWriter, TokenType
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from serving.convert import ConversionError, convert_llama_gguf

D_MODEL, D_MLP, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 12, 2, 1, 4
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "2", "ab", "ĠĠ"]
FloatArray = npt.NDArray[np.float32]


def llama_cpp_order(rows: FloatArray, num_heads: int) -> FloatArray:
    """What llama.cpp's converter does to query and key rows: the two halves of a head are interleaved."""
    heads = rows.reshape(num_heads, 2, HEAD_DIM // 2, D_MODEL)
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(rows.shape))


def weights() -> dict[str, FloatArray]:
    rng = np.random.default_rng(0)
    shapes = {
        "q_proj": (NUM_HEADS * HEAD_DIM, D_MODEL),
        "k_proj": (NUM_KV_HEADS * HEAD_DIM, D_MODEL),
        "v_proj": (NUM_KV_HEADS * HEAD_DIM, D_MODEL),
        "o_proj": (D_MODEL, NUM_HEADS * HEAD_DIM),
        "gate_proj": (D_MLP, D_MODEL),
        "up_proj": (D_MLP, D_MODEL),
        "down_proj": (D_MODEL, D_MLP),
        "input_layernorm": (D_MODEL,),
        "post_attention_layernorm": (D_MODEL,),
        "norm": (D_MODEL,),
        "embed_tokens": (len(TOKENS), D_MODEL),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, *, architecture: str = "llama", omit: str = "", extra: str = "") -> dict[str, FloatArray]:
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    values = weights()
    named = {
        "token_embd.weight": values["embed_tokens"],
        "output_norm.weight": values["norm"],
        "blk.0.attn_norm.weight": values["input_layernorm"],
        "blk.0.ffn_norm.weight": values["post_attention_layernorm"],
        "blk.0.attn_q.weight": llama_cpp_order(values["q_proj"], NUM_HEADS),
        "blk.0.attn_k.weight": llama_cpp_order(values["k_proj"], NUM_KV_HEADS),
        "blk.0.attn_v.weight": values["v_proj"],
        "blk.0.attn_output.weight": values["o_proj"],
        "blk.0.ffn_gate.weight": values["gate_proj"],
        "blk.0.ffn_up.weight": values["up_proj"],
        "blk.0.ffn_down.weight": values["down_proj"],
    }
    named.pop(omit, None)
    if extra:
        named[extra] = values["norm"]
    for name, value in named.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def test_weights_come_back_as_transformers_names_and_orders_them(tmp_path: Path, target: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf")
    convert_llama_gguf(tmp_path / "tiny.gguf", target, progress=print)

    found = load_file(target / "model.safetensors")
    layer = "model.layers.0"
    expected = {
        "model.embed_tokens.weight": values["embed_tokens"],
        "model.norm.weight": values["norm"],
        **{f"{layer}.self_attn.{name}.weight": values[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{f"{layer}.mlp.{name}.weight": values[name] for name in ("gate_proj", "up_proj", "down_proj")},
        f"{layer}.input_layernorm.weight": values["input_layernorm"],
        f"{layer}.post_attention_layernorm.weight": values["post_attention_layernorm"],
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_config_and_tokenizer_say_what_the_header_says(tmp_path: Path, target: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert_llama_gguf(tmp_path / "tiny.gguf", target, progress=print)

    config = json.loads((target / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 4)
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"

    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>ab  12<|im_end|>").tokens == [
        "<|im_start|>",
        "ab",
        "ĠĠ",
        "1",
        "2",
        "<|im_end|>",
    ]


def test_two_conversions_give_the_same_bytes(tmp_path: Path, target: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    again = tmp_path / "again"
    again.mkdir()
    for folder in (target, again):
        convert_llama_gguf(tmp_path / "tiny.gguf", folder, progress=print)
    for path in target.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gemma3"}, "general.architecture is 'gemma3'; only 'llama'"),
        ({"omit": "blk.0.ffn_up.weight"}, "10 tensors, but a Llama model of 1 layers has 11"),
        ({"extra": "blk.0.attn_q.bias"}, "'blk.0.attn_q.bias' has no counterpart"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, target: Path, arguments: dict[str, str], message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", **arguments)
    with pytest.raises(ConversionError, match=message):
        convert_llama_gguf(tmp_path / "tiny.gguf", target, progress=print)
