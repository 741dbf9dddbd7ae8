"""Drawing on the device gives, to the bit, what the sampler gives."""

import random

import pytest
import torch

from model.request import SamplingParams
from model.sampling.device import Draws, draw_rows, needs_host
from model.sampling.random import uniform, uniforms
from model.sampling.sampler import Row, sample
from tests.model.helpers_kernels import DEVICE


def test_many_uniforms_are_the_single_ones() -> None:
    rng = random.Random(0)
    seeds = [0, 1, 2**63 - 1, *(rng.randrange(2**63) for _ in range(50))]
    positions = [0, 2**40, 5, *(rng.randrange(2**20) for _ in range(50))]
    assert uniforms(seeds, positions).tolist() == [uniform(s, p) for s, p in zip(seeds, positions, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 300])
def test_the_same_ids_as_the_sampler(vocab: int, dtype: torch.dtype) -> None:
    """70 rows: more than are drawn at a time. In bfloat16 many scores are equal."""
    rng = random.Random(vocab)
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.0, 3.0]),
            top_k=rng.choice([0, 1, 4, 1000]),
            top_p=rng.choice([1.0, 0.9, 0.1]),
            min_p=rng.choice([0.0, 0.2]),
            seed=rng.randrange(2**63),
        )
        for _ in range(70)
    ]
    logits = torch.randn(70, vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    logits[3] = torch.nan
    logits[4, 2] = torch.inf
    logits[5] = -torch.inf
    positions = [rng.randrange(30) for _ in params]
    ids, bad = draw_rows(logits, Draws(params, positions))
    expected = sample(logits, [Row(p, (1,), [0] * at) for p, at in zip(params, positions, strict=True)])
    assert (ids.tolist(), bad.tolist()) == (expected.token_ids, expected.bad)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(presence_penalty=0.1),
        SamplingParams(frequency_penalty=-0.1),
        SamplingParams(logit_bias=((1, 2.0),)),
        SamplingParams(num_logprobs=0),
        SamplingParams(min_tokens=4, stop_token_ids=(1,)),
    ],
)
def test_what_the_host_has_to_draw(params: SamplingParams) -> None:
    assert needs_host(params, 3)
    assert needs_host(params, 4) == (params.min_tokens == 0)
    assert not needs_host(SamplingParams(), 0)
