"""The encoder against transformers on tiny random checkpoints, and a text alone against the same text among others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model.config import CheckpointError
from model.families.registry import FAMILIES, read_config
from model.nn.bert import Encoder, SpanAttention, text_positions
from model.tokenizer import Tokenizer
from model.weights import load_network

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 120,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("BertModel", SMALL),
    "one-head-relu": ("BertModel", {**SMALL, "num_attention_heads": 1, "hidden_act": "relu", "type_vocab_size": 1}),
    "tanh-gelu": ("BertModel", {**SMALL, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "with-a-masked-head": ("BertForMaskedLM", SMALL),
    "labels": ("BertForSequenceClassification", {**SMALL, "id2label": {0: "bad", 1: "good", 2: "neither"}}),
    "unnamed-labels": ("BertForSequenceClassification", SMALL),
}


def checkpoint(folder: Path, case: str) -> Any:
    """A random network of transformers', and its folder; norms and biases are random too: none shall be passed over."""
    name, settings = CASES[case]
    config = transformers.BertConfig(**settings)
    torch.manual_seed(1)
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def load(folder: Path) -> Encoder:
    network = load_network(folder, read_config(folder), torch.float32, CPU)
    assert isinstance(network, Encoder)
    return network


def hidden(encoder: Encoder, texts: list[list[int]]) -> tuple[torch.Tensor, ...]:
    lengths = [len(text) for text in texts]
    ids = torch.tensor([token for text in texts for token in text])
    return torch.split_with_sizes(encoder(ids, text_positions(lengths), SpanAttention(lengths)), lengths)


def random_texts(*lengths: int) -> list[list[int]]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(97, (length,), generator=draws).tolist() for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_hidden_rows_and_labels_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs, texts = checkpoint(tmp_path, case), random_texts(120, 1, 17)
    encoder = load(tmp_path)
    for text, rows in zip(texts, hidden(encoder, texts), strict=True):
        inner = getattr(theirs, "bert", theirs)
        torch.testing.assert_close(rows, inner(torch.tensor([text])).last_hidden_state[0], atol=1e-4, rtol=0)
        if encoder.config.labels:
            scores = encoder.scores(rows[:1], SpanAttention([1]))
            torch.testing.assert_close(scores, theirs(torch.tensor([text])).logits, atol=1e-4, rtol=0)


def test_labels_are_read_by_their_numbers(tmp_path: Path) -> None:
    checkpoint(tmp_path / "three", "labels")
    checkpoint(tmp_path / "two", "unnamed-labels")
    assert read_config(tmp_path / "three").labels == ("bad", "good", "neither")
    assert read_config(tmp_path / "two").labels == ("LABEL_0", "LABEL_1")


def test_a_config_comes_back_as_it_was_written(tmp_path: Path) -> None:
    checkpoint(tmp_path, "labels")
    config = read_config(tmp_path)
    assert FAMILIES["bert"].read_config(FAMILIES["bert"].write_config(config)) == config
    assert config.tasks == ("embed", "classify")


def test_old_names_of_norms_are_known(tmp_path: Path) -> None:
    checkpoint(tmp_path, "plain")
    tensors, today = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    save_file(old, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(today.parameters(), load(tmp_path).parameters(), strict=True))


def test_a_missing_classifier_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "plain")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight.* not found"):
        load(tmp_path)


@pytest.mark.parametrize(("key", "pooling"), [("pooling_mode_cls_token", "cls"), ("pooling_mode_mean_tokens", "mean")])
def test_pooling_is_what_the_folder_says(key: str, pooling: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, "plain")
    assert read_config(tmp_path).pooling == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({key: True}))
    assert read_config(tmp_path).pooling == pooling


def test_word_pieces_are_those_of_transformers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "anim", "##al", "cross", "##ed", "电", "影", ",", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in ("The ANIMAL crossed, the 电影.", "crossedx the", "  thé "):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode("the animal crossed")) == "the animal crossed"
