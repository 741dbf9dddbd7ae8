"""Encoder-decoders beside other people's: `torch.nn.Transformer`, and T5 as transformers has it; both at once and
step by step over the cache."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models
from torch import Tensor, nn

from model.config import ModelConfig
from model.engine.engine import Engine
from model.families.registry import read_config
from model.nn.decoder import Decoder
from model.nn.encoder import DenseEncoding
from model.nn.maps import alignment_maps
from model.nn.reading import DenseReading
from model.request import Request, SamplingParams
from model.weights import load_decoder
from tests.model.conftest import random_decoder

VANILLA = ModelConfig(
    family="transformer",
    vocab_size=99,
    hidden_size=32,
    num_layers=2,
    encoder_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=48,
    max_position=512,
    norm="layernorm",
    position="sinusoidal",
    activation="relu",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    start_id=0,
    eos_ids=(0,),
    post_norm=True,
    scaled_embedding=True,
)
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
TARGETS = [[0, 20, 21, 22, 23], [0, 30, 31, 32, 33]]


def dense_logits(decoder: Decoder, sources: list[list[int]], targets: list[list[int]]) -> Tensor:
    """All logits [b, t, vocab] at once, in the way of training; targets of one length."""
    b, s, t = len(sources), max(map(len, sources)), len(targets[0])
    lengths = torch.tensor([len(source) for source in sources])
    padded = torch.tensor([source + [0] * (s - len(source)) for source in sources])
    encoding = DenseEncoding(decoder.config, b, s, lengths)
    memory = decoder.encode(padded.flatten(), torch.arange(s).repeat(b), encoding)
    ops = DenseReading(decoder.config, b, t, decoder.memory(memory, encoding), lengths)
    hidden = decoder(torch.tensor(targets).flatten(), torch.arange(t).repeat(b), ops)
    return decoder.logits(hidden, ops).view(b, t, -1)


def copied(decoder: Decoder) -> nn.Transformer:
    """The same network in torch's words. It has a norm more at either end, which the paper has not."""
    config = decoder.config
    theirs = nn.Transformer(
        config.hidden_size, config.num_heads, config.encoder_layers, config.num_layers, config.intermediate_size,
        dropout=0.0, batch_first=True,
    )  # fmt: skip
    theirs.encoder.norm = theirs.decoder.norm = None
    pairs: list[tuple[Any, Any]] = []
    encoders = list[tuple[Any, Any]](zip(cast(Any, decoder.encoder).layers, theirs.encoder.layers, strict=True))
    decoders = list[tuple[Any, Any]](zip(decoder.layers, theirs.decoder.layers, strict=True))
    for layer, their in encoders:
        pairs += [(layer.attn_norm, their.norm1), (layer.mlp_norm, their.norm2)]
    for layer, their in decoders:
        pairs += [(layer.attn_norm, their.norm1), (layer.cross_norm, their.norm2), (layer.mlp_norm, their.norm3)]
        pairs += [(layer.cross.out, their.multihead_attn.out_proj)]
        their.multihead_attn.in_proj_weight.data = torch.cat([layer.cross.q.weight, layer.cross.kv.weight])
        their.multihead_attn.in_proj_bias.data = torch.cat([layer.cross.q.bias, layer.cross.kv.bias])
    for layer, their in encoders + decoders:
        their.self_attn.in_proj_weight.data = layer.attn.qkv.weight
        their.self_attn.in_proj_bias.data = layer.attn.qkv.bias
        pairs += [(layer.attn.out, their.self_attn.out_proj)]
        pairs += [(layer.mlp.up, their.linear1), (layer.mlp.down, their.linear2)]
    for our, their in pairs:
        their.load_state_dict(our.state_dict())
    return theirs.eval().requires_grad_(False)


def test_the_transformer_of_2017_is_torchs() -> None:
    decoder = random_decoder(VANILLA)
    theirs = copied(decoder)

    def embedded(ids: list[int]) -> Tensor:
        positions = cast(nn.Module, decoder.positions)(torch.arange(len(ids)))
        return cast(Tensor, decoder.embed(torch.tensor(ids)) * 32**0.5 + positions)[None]

    ours = dense_logits(decoder, SOURCES, TARGETS)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for source, target, logits in zip(SOURCES, TARGETS, ours, strict=True):
        hidden = theirs(embedded(source), embedded(target), tgt_mask=mask, tgt_is_causal=True)[0]
        torch.testing.assert_close(logits, hidden @ decoder.embed.weight.T, atol=1e-4, rtol=1e-4)


FORMS = [("relu", True), ("relu", False), ("gated-gelu", True), ("gated-gelu", False)]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0]}-{'tied' if form[1] else 'untied'}")
def t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A tiny random T5 as transformers makes and saves it, and the folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    form, tied = request.param
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        feed_forward_proj=form, tie_word_embeddings=tied, decoder_start_token_id=0, relative_attention_max_distance=20,
        relative_attention_num_buckets=12, initializer_factor=1.5,
    )  # fmt: skip
    theirs = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("t5")
    if not tied:
        theirs.lm_head.weight = nn.Parameter(torch.randn_like(theirs.lm_head.weight), requires_grad=False)
        theirs.config.tie_word_embeddings = False
    theirs.save_pretrained(folder)
    return folder, theirs


def loaded(folder: Path, dtype: torch.dtype = torch.float32, int8: bool = False) -> Decoder:
    return load_decoder(folder, read_config(folder), dtype, torch.device("cpu"), quantized=int8)


def test_t5_is_that_of_transformers(t5: tuple[Path, nn.Module]) -> None:
    folder, theirs = t5
    source, target = list(range(3, 60)), [[0, *range(40, 70)]]
    logits = dense_logits(loaded(folder), [source], target)
    wanted = theirs(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor(target)).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_t5_in_bfloat16_is_as_near_as_that_of_transformers(t5: tuple[Path, nn.Module]) -> None:
    folder, theirs = t5
    source, target = list(range(3, 60)), [[0, *range(40, 70)]]
    wanted = dense_logits(loaded(folder), [source], target)[0]
    ours = dense_logits(loaded(folder, torch.bfloat16), [source], target)[0]
    ids = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor(target)}
    other = copy.deepcopy(theirs).bfloat16()(**ids).logits[0]
    assert 0 < (ours - wanted).norm() < 1.5 * (other - wanted).norm()


def test_t5_in_int8_is_near(t5: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """With attention about as sharp as in a trained network: the fixture's is so sharp that any rounding tells."""
    _, theirs = t5
    softer = copy.deepcopy(theirs)
    for parameter in softer.parameters():
        parameter.div_(1.5)
    cast(Any, softer).save_pretrained(tmp_path)
    source, target = list(range(3, 60)), [[0, *range(40, 70)]]
    wanted, found = (dense_logits(loaded(tmp_path, int8=int8), [source], target) for int8 in (False, True))
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.06


def test_alignments_are_the_cross_attentions_of_transformers(t5: tuple[Path, nn.Module]) -> None:
    folder, theirs = t5
    cast(Any, theirs).set_attn_implementation("eager")
    source, answer = list(range(3, 60)), list(range(40, 70))
    given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *answer[:-1]]])}
    wanted = torch.cat(theirs(**given, output_attentions=True).cross_attentions)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(alignment_maps(loaded(folder), source, answer), wanted, atol=1e-4, rtol=1e-4)


def test_t5_generates_what_transformers_does(t5: tuple[Path, nn.Module]) -> None:
    """The served way, from the folder, step by step and batched, beside a generation without a cache."""
    folder, theirs = t5
    save_tokenizer(folder)
    engine = Engine.load(folder, max_model_len=160, max_num_seqs=4)
    sources = [list(range(3, 90)), list(range(30, 35)), [*range(10, 90), *range(10, 70)]]
    params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(1,), eos_ids=(1,))
    for i, source in enumerate(sources):
        engine.add(Request(f"{i}", (0,), params, source_ids=tuple(source)))
    out: dict[str, list[int]] = {f"{i}": [0] for i in range(len(sources))}
    while engine.has_work():
        for delta in engine.step():
            out[delta.id] += delta.token_ids
    for ids, source in zip(out.values(), sources, strict=True):
        wanted = cast(Any, theirs).generate(torch.tensor([source]), max_new_tokens=30, do_sample=False, use_cache=False)
        assert ids == wanted[0].tolist()


def save_tokenizer(folder: Path) -> None:
    """99 words, one for each id."""
    words = Library(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w2"))
    words.save(str(folder / "tokenizer.json"))
