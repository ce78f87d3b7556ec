"""Sentence similarity: pooling on a tiny model of our own, values on the real one where it is in the cache."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from emoe_core.errors import DataError
from workbench.quality import similarity as module
from workbench.quality.similarity import SentenceEncoder, similarity

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "fish", "bird", "swims", "sings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sentence-transformers folder with a random BERT of two layers."""
    path = tmp_path_factory.mktemp("encoder")
    (path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(path)
    kinds = ("Transformer", "Pooling", "Normalize")
    (path / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}"} for k in kinds]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    return SentenceEncoder.from_folder(folder)


def test_an_embedding_is_the_normalised_mean_over_the_texts_own_tokens(folder, tiny):
    texts = ["red fish swims", "blue bird", "green"]
    tokenizer, model = BertTokenizerFast.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    for text, row in zip(texts, tiny.encode(texts), strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(dim=0)
        np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-5)


def test_many_texts_are_embedded_in_their_own_order(tiny):
    texts = [" ".join(np.random.default_rng(n).choice(WORDS[5:], size=1 + n % 5)) for n in range(70)]
    rows = tiny.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    for index in (0, 33, 69):
        np.testing.assert_allclose(rows[index], tiny.encode([texts[index]])[0], atol=1e-5)
    assert np.array_equal(rows, tiny.encode(texts))


def test_a_text_is_cut_at_the_models_limit(tiny):
    long = "red green blue fish bird swims sings"
    assert similarity([long], [f"{long} red red"], tiny)[0] == pytest.approx(similarity([long], [long], tiny)[0])
    assert similarity(["red green"], ["red green red red"], tiny)[0] < 0.9999


def test_empty_texts_are_alike_and_unlike_anything_else(tiny):
    found = similarity(["", " \n", "", "red", "red"], ["", "", "red", "\t", "red"], tiny)
    np.testing.assert_allclose(found, [1, 1, 0, 0, 1], atol=1e-6)
    assert similarity([], [], tiny).shape == (0,)


def test_similarity_is_symmetric_and_within_its_range(tiny):
    a, b = ["red fish", "blue bird sings", "green"], ["bird swims", "red", "green fish swims"]
    found = similarity(a, b, tiny)
    np.testing.assert_allclose(found, similarity(b, a, tiny), atol=1e-6)
    assert found.shape == (3,) and (np.abs(found) <= 1).all() and (found < 0.9999).all()


def test_lists_of_different_length_are_refused(tiny):
    with pytest.raises(DataError, match="pair 2 texts with 1"):
        similarity(["a", "b"], ["a"], tiny)


def test_a_model_with_another_pooling_is_refused(folder, tmp_path):
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    (other / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(DataError, match="pooling_mode_cls_token"):
        SentenceEncoder.from_folder(other)


def test_altered_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    module.model_folder().mkdir(parents=True)
    (module.model_folder() / "model.safetensors").write_bytes(b"not the weights")
    module.encoder.cache_clear()
    with pytest.raises(DataError, match="damaged"):
        module.encoder()


@pytest.mark.skipif(not module.is_prepared(), reason="the similarity model is not in the cache")
def test_integration_minilm_gives_its_published_similarities():
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    found = similarity([texts[0], texts[0], texts[1]], [texts[1], texts[2], texts[2]])
    np.testing.assert_allclose(found, [0.6660, 0.1046, 0.1411], atol=1e-4)
