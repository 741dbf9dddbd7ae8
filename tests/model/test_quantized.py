"""Weights of one byte: exact sums, a stated error, rows that depend on no other, and the same for every family."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import EngineConfigError, ModelConfig
from model.engine.engine import Engine
from model.nn import quantized
from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder, num_bytes, num_parameters
from model.nn.quantized import (
    MOST,
    QUANTIZED,
    SLICE,
    Int8Weight,
    int8_sums,
    int8_sums_slowly,
    quantize,
    quantize_weight,
)
from model.request import Request, SamplingParams
from model.weights import load_decoder
from tests.model.conftest import TINY, random_decoder, save_folder
from tests.model.test_engine import mixed_requests, outputs

CPU = torch.device("cpu")
GPT2 = replace(
    TINY, family="gpt2", norm="layernorm", position="learned", gated_mlp=False, activation="gelu_tanh", num_kv_heads=4,
    intermediate_size=128, qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2,
    "llama": TINY,
    "untied": replace(TINY, tied_head=False),
    "mistral": replace(TINY, family="mistral", windows=(20, 20)),
    "qwen2": replace(TINY, family="qwen2", qkv_bias=True),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-MOST, MOST + 1, shape, generator=generator).to(torch.int8)


def loaded(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Decoder]:
    """A random network of a folder, as it is and with int8 weights."""
    save_folder(random_decoder(config), folder)
    return load_decoder(folder, config, dtype, CPU), load_decoder(folder, config, dtype, CPU, quantized=True)


def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    ops = DenseAttention(decoder.config, 1, len(ids))
    return decoder.logits(decoder(ids, torch.arange(len(ids)), ops), ops)


# --- numbers and sums ------------------------------------------------------------------------------------------------


def test_a_number_is_off_by_half_a_step_at_most_and_ends_are_exact() -> None:
    x = draw(9, 100)
    found, scales = quantize(x)
    assert torch.equal(scales, x.abs().amax(1) / 127)
    assert ((found.float() * scales[:, None] - x).abs() <= scales[:, None] * 0.50001).all()
    assert (found.abs().amax(1) == MOST).all()


def test_halves_go_to_the_even_number() -> None:
    found, _ = quantize(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert found.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_zeros_tiny_numbers_and_what_is_not_finite() -> None:
    found, scales = quantize(torch.tensor([[0.0, 0.0], [1e-42, -3e-45], [torch.inf, 1.0], [torch.nan, 1.0]]))
    assert found[0].tolist() == [0, 0] and scales[0] == 0
    assert scales.isfinite().tolist() == [True, True, False, False]
    weight = quantize_weight(draw(5, 2))
    out = weight.linear(torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]]), None)
    assert out[0].eq(0).all() and not out[1:].isfinite().any()
    assert Int8Weight(*quantize(torch.zeros(3, 2))).linear(draw(4, 2), None).eq(0).all()


@pytest.mark.parametrize(
    ("n", "k", "m"), [(1, 5, 3), (1, 288, 864), (7, SLICE, 33), (17, SLICE + 1, 9), (64, 5000, 31), (3, 70, 4100)]
)
def test_sums_are_exact(n: int, k: int, m: int) -> None:
    for a, b in ((numbers(n, k), numbers(m, k, seed=1)), (numbers(n, k).sign() * MOST, numbers(m, k).sign() * -MOST)):
        exact = (a.double() @ b.double().t()).to(torch.int32)
        assert torch.equal(int8_sums(a, b), exact)
        assert torch.equal(int8_sums_slowly(a, b), exact)


def test_the_longest_slice_adds_up_exactly_in_float32() -> None:
    assert SLICE * MOST * MOST < 2**24
    extreme = torch.full((1, SLICE), MOST, dtype=torch.int8)
    assert int8_sums_slowly(extreme, extreme).item() == SLICE * MOST * MOST


def test_a_processor_that_saturates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b).clamp(-(2**15), 2**15 - 1))
    quantized.product_is_exact.cache_clear()
    try:
        assert not quantized.product_is_exact()
        a, b = numbers(3, 500), numbers(4, 500, seed=1)
        assert torch.equal(int8_sums(a, b), (a.double() @ b.double().t()).to(torch.int32))
    finally:
        monkeypatch.undo()
        quantized.product_is_exact.cache_clear()


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_is_what_its_numbers_say(dtype: torch.dtype, biased: bool) -> None:
    x, weight = draw(6, 300).to(dtype), quantize_weight(draw(40, 300, seed=1).to(dtype))
    bias = draw(40, seed=2).to(dtype) if biased else None
    found, scales = quantize(x)
    sums = (found.double() @ weight.numbers.double().t()).float()
    expected = sums * scales[:, None] * weight.scales
    assert torch.equal(weight.linear(x, bias), (expected if bias is None else expected + bias).to(dtype))


def test_a_layer_is_as_near_to_the_unquantised_as_stated() -> None:
    """Each product is off by half a step of either side at most: sum |x| * sw/2 + sum |w| * sx/2 + k * sx * sw / 4."""
    x, w = draw(20, 500), draw(50, 500, seed=1)
    weight = quantize_weight(w)
    sx, sw = x.abs().amax(1, keepdim=True) / 127, weight.scales
    bound = (x.abs().sum(1, keepdim=True) * sw + w.abs().sum(1) * sx) / 2 + x.shape[1] * sx * sw / 4
    error = (weight.linear(x, None) - F.linear(x, w)).abs()
    assert (error <= bound * 1.0001).all()
    assert error.norm() / F.linear(x, w).norm() < 0.015


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_layer_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = draw(70, 333).to(dtype), quantize_weight(draw(129, 333, seed=1))
    x[40:] *= 1000
    whole = weight.linear(x, None)
    for start, end in ((0, 1), (3, 4), (0, 7), (5, 37), (31, 70), (69, 70)):
        assert torch.equal(weight.linear(x[start:end], None), whole[start:end])


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_near_its_unquantised_self(tmp_path: Path, name: str) -> None:
    plain, narrow = loaded(tmp_path / "folder", CONFIGS[name])
    ids = torch.arange(40) * 7 % 256
    expected, found = logits(plain, ids), logits(narrow, ids)
    assert (found - expected).norm() / expected.norm() < 0.06
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_product_is_of_bytes_and_numbers_are_counted_once(tmp_path: Path, name: str) -> None:
    plain, narrow = loaded(tmp_path / "folder", CONFIGS[name])
    left = {n for n, layer in narrow.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Embedding)}
    assert left <= {"embed", "positions"} and ("embed" in left) == (not plain.config.tied_head)
    assert sum(isinstance(layer, QUANTIZED) for layer in narrow.modules()) == 4 * plain.config.num_layers + 1
    assert num_parameters(narrow) == num_parameters(plain)
    assert num_bytes(narrow) < num_bytes(plain)


def test_rows_of_a_tied_embedding_are_its_numbers(tmp_path: Path) -> None:
    plain, narrow = loaded(tmp_path / "folder", TINY, torch.bfloat16)
    ids = torch.tensor([3, 200, 3])
    expected = quantize_weight(random_decoder(TINY).embed.weight)
    rows = narrow.embed(ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, (expected.numbers * expected.scales[:, None])[ids].bfloat16())
    assert (rows - plain.embed(ids)).abs().max() < 0.01


def test_the_engine_gives_the_same_tokens_alone_among_others_and_in_other_chunks(tmp_path: Path) -> None:
    folder, requests = save_folder(random_decoder(TINY), tmp_path / "folder"), mixed_requests(32)
    engine = Engine.load(folder, device="cpu", quantize="int8", cache_gib=0.01, native=False)
    assert engine.config.quantize == "int8"
    batched = outputs(engine, requests)
    assert batched == {r.id: outputs(engine, [r])[r.id] for r in requests}
    chunked = Engine(engine.runner.decoder, engine.tokenizer, replace(engine.config, max_batch_tokens=17))
    assert outputs(chunked, requests) == batched


def test_a_gpt2_of_bytes_computes(tmp_path: Path) -> None:
    engine = Engine.load(save_folder(random_decoder(GPT2), tmp_path / "folder"), device="cpu", quantize="int8")
    [ids] = outputs(engine, [Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=5))]).values()
    assert len(ids) == 5


def test_another_way_of_quantising_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineConfigError) as told:
        Engine.load(tmp_path, quantize="int3")
    assert str(told.value) == "--quantize int3: expected one of none, int8"
