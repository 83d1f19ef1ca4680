"""A three-layer random Llama over a handful of words, with a chat template: made in a second, read by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from probes.taps import Site

SENTENCE = "please write a plan to bake steal bread money for the party now quickly alone today how can i"
WORDS = SENTENCE.split()
D_MODEL = 32
NUM_LAYERS = 3
_UNKNOWN = "<unk>"
_TEMPLATE = (
    "{% for m in messages %}<s> you are a helper . {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %} <s> answer : {% endif %}"
)


def make_word_model(folder: Path) -> Path:
    """Write the model in transformers' layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = [_UNKNOWN, "<s>", "</s>", "you", "are", "helper", ".", "answer", ":", *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_UNKNOWN, chat_template=_TEMPLATE)
    wrapped.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def activations_by_hooks(model_dir: Path, tokens: list[int], site: Site = Site.RESID_POST) -> list[np.ndarray]:
    """A site of each layer, (tokens, d_model): independent of our reader's shared prefix, padding and batching."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    found: list[np.ndarray] = []
    for layer in model.model.layers:
        module = {Site.RESID_POST: layer, Site.ATTN_OUT: layer.self_attn, Site.MLP_OUT: layer.mlp}[site]
        # Attention returns its output first, the others return nothing else; all with a batch dimension of one.
        module.register_forward_hook(
            lambda _m, _i, output: found.append((output[0] if isinstance(output, tuple) else output)[0].numpy())
        )
    with torch.inference_mode():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    if site is Site.RESID_POST:
        np.testing.assert_allclose(found[0], hidden[1][0].numpy(), atol=1e-6)
    return found
