"""16-bit products on a CPU whose rows depend on no other row, and an engine made of them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from model.engine.engine import Engine
from model.nn import pieces
from model.nn.pieces import COUNTS, agreeing_counts, by_pieces, cut
from model.nn.rows import cancelling
from tests.model.conftest import TINY, MakeEngine, random_decoder
from tests.model.test_engine import mixed_requests, outputs

SHAPES = [(64, 32), (96, 257), (320, 576), (256, 640), (576, 1536)]


@pytest.mark.parametrize("counts", [(1,), (4,), (64, 128), (1, 2, 4, 8, 16, 32), COUNTS])
@pytest.mark.parametrize("num", [1, 3, 31, 64, 65, 300, 512, 1000])
def test_pieces_hold_all_rows_and_few_more(num: int, counts: tuple[int, ...]) -> None:
    found = cut(num, counts)
    assert set(found) <= set(counts)
    assert num <= sum(found) < num + max(counts[0], pieces.CALL)


@pytest.mark.parametrize("num", [1, 5, 33, 200])
def test_a_product_in_pieces_has_every_row_in_its_place(num: int) -> None:
    x, weight = torch.arange(num * 4.0).view(num, 4), torch.eye(4)
    assert torch.equal(by_pieces(x, (2, 8, 16), lambda part: F.linear(part, weight)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_pieces_do_not_depend_on_the_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    counts = agreeing_counts(shape, dtype, 512)
    if not counts:
        pytest.skip("this processor's products depend on a row's place")
    rows, weight = cancelling(300, *shape, dtype)

    def product(x: torch.Tensor) -> torch.Tensor:
        return by_pieces(x, counts, lambda part: F.linear(part, weight))

    whole = product(rows)
    for start, end in ((0, 1), (7, 8), (0, 7), (100, 133), (36, 300)):
        assert torch.equal(product(rows[start:end].contiguous()), whole[start:end])


def test_a_library_that_depends_on_the_number_of_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here up to 32 rows are added up in one order, and more in another."""

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        order = torch.arange(x.shape[1])
        order = order.flip(0) if len(x) > 32 else order
        total = torch.zeros(len(x), len(weight))
        for k in order.tolist():
            total += x[:, k, None].float() * weight[:, k].float()
        return total.to(x.dtype)

    monkeypatch.setattr("model.nn.pieces.F.linear", linear)
    assert agreeing_counts((40, 96), torch.bfloat16, 512) == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_tokens_alone_among_others_and_in_other_chunks(make_engine: MakeEngine, dtype: str) -> None:
    wide = random_decoder(replace(TINY, hidden_size=160, intermediate_size=400)).to(getattr(torch, dtype))
    requests = mixed_requests(24)

    def make(tokens: int) -> Engine:
        engine = make_engine(wide)
        config = replace(engine.config, dtype=dtype, deterministic=True, max_batch_tokens=tokens)
        return Engine(wide, engine.tokenizer, config)

    batched, single = outputs(make(512), requests), make(50)
    assert batched == {r.id: outputs(single, [r])[r.id] for r in requests}
    assert outputs(make(70), requests) == batched
