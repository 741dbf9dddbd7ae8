"""Layers whose past has a constant size: step by step as all at once, and each kind against its plain words."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.engine.engine import Engine
from model.kinds import RANDOM_BLOCK, Window, random_blocks, read_kind
from model.nn.attention import Attention, DenseAttention
from model.nn.favor import Features, LinearAttention
from model.nn.lstm import LstmMixer
from model.nn.memory import MemoryAttention
from model.nn.positions import LongRotary, Rotary
from model.request import Request, SamplingParams
from tests.model.conftest import TINY, MakeEngine
from tests.model.helpers_streams import WORDS, network, parallel, shape, some_ids, stepped
from tests.model.test_engine import mixed_requests, outputs

ENDLESS = [word for word in WORDS if "full" not in word]


@pytest.mark.parametrize("word", WORDS)
def test_step_by_step_is_all_at_once_and_chunks_do_not_show_to_the_bit(word: str) -> None:
    decoder, ids = network(word), some_ids(300)
    once = stepped(decoder, ids, 300)
    torch.testing.assert_close(once, parallel(decoder, ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(stepped(decoder, ids, 37), once)
    assert torch.equal(stepped(decoder, ids, 1), once)


@pytest.mark.parametrize("word", WORDS)
def test_batched_preempted_and_resumed_streams_are_those_alone(make_engine: MakeEngine, word: str) -> None:
    decoder, requests = network(word), mixed_requests(16, max_prompt=120)
    whole = outputs(make_engine(decoder), requests)
    for request in requests[::5]:
        assert outputs(make_engine(decoder), [request])[request.id] == whole[request.id]
    assert outputs(make_engine(decoder, num_blocks=14, max_batch_tokens=23, max_num_seqs=6), requests) == whole
    engine = make_engine(decoder)
    for request in requests:  # as another worker left them
        engine.add(request, so_far=whole[request.id][: len(whole[request.id]) // 2])
    rest: dict[str, tuple[int, ...]] = {}
    while engine.has_work():
        for delta in engine.step():
            rest[delta.id] = rest.get(delta.id, ()) + delta.token_ids
    assert all(whole[id][len(whole[id]) // 2 :] == ids for id, ids in rest.items())
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def grown(engine: Engine, num_prompt: int) -> int:
    """Blocks in use while a stream of so many tokens goes on."""
    engine.add(Request("a", tuple(some_ids(num_prompt)), SamplingParams(max_tokens=3)))
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, engine.scheduler.pool.num_used)
    return most


@pytest.mark.parametrize("word", ENDLESS)
def test_a_stream_has_as_many_blocks_however_long_it_is(make_engine: MakeEngine, word: str) -> None:
    sizes = [grown(make_engine(network(word), max_batch_tokens=32, max_model_len=9000), n) for n in (300, 3000)]
    assert sizes[1] <= max(sizes[0], 12)  # a random block may lie across other blocks
    assert (sizes[0] == 0) == (network(word).config.cached_layers == ())


def test_a_network_that_breaks_leaves_no_trace_in_its_slot(make_engine: MakeEngine) -> None:
    decoder = network("lstm:24,linear:16")
    params = SamplingParams(max_tokens=5, temperature=0.0)
    good = Request("good", (1, 2, 3), params)
    expected = outputs(make_engine(decoder), [good])
    engine = make_engine(decoder, max_num_seqs=1)
    kept = decoder.embed.weight[7].clone()
    decoder.embed.weight[7] = torch.nan
    engine.add(Request("bad", (1, 7, 3), params))
    [delta] = [delta for delta in engine.step() if delta.finish]
    assert delta.finish is not None and delta.finish.error
    decoder.embed.weight[7] = kept
    assert outputs(engine, [good]) == expected


def plain_window(attn: Attention, x: Tensor, kind: Window) -> Tensor:
    """Masked attention over everything, one row and one head at a time, each key turned or not as the kind says."""
    t, d = len(x), attn.head_dim
    q, k, v = attn.qkv(x).view(t, -1, d).split([attn.heads, attn.kv_heads, attn.kv_heads], dim=1)
    turn = Rotary(TINY.rope, d, t)
    cos, sin = (table[:, None] for table in (turn.get_buffer("cos"), turn.get_buffer("sin")))

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    rows, (near_q, near_k) = [], (turned(q), turned(k))
    for p in range(t):
        kept = random_blocks(kind.size, kind.num_random, p)
        near = list(range(max(0, p - kind.size + 1), p + 1))
        far = [j for j in range(near[0]) if j < kind.num_global or j // RANDOM_BLOCK in kept]
        for head in range(attn.heads):
            own = head // (attn.heads // attn.kv_heads)
            scores = torch.cat([k[far, own] @ q[p, head], near_k[near, own] @ near_q[p, head]]) / math.sqrt(d)
            rows.append(scores.softmax(0) @ v[far + near, own])
    mixed: Tensor = attn.out(torch.stack(rows).view(t, -1))
    return mixed


@pytest.mark.parametrize("word", ["window:24", "window:24:3", "window:24:0:2", "window:24:3:2", "window:24:40:1"])
def test_a_window_is_masked_full_attention(word: str) -> None:
    config, x = shape(word), torch.randn(150, TINY.hidden_size)
    attn, kind = network(word).layers[0].attn, config.kind(0)
    assert isinstance(attn, Attention) and isinstance(kind, Window)
    torch.testing.assert_close(attn(x, None, DenseAttention(config, 1, 150)), plain_window(attn, x, kind))


def segment_by_segment(attn: MemoryAttention, x: Tensor) -> Tensor:
    """Transformer-XL as its paper has it: the hidden rows before a segment are kept, and projected again with it."""
    d, kv, outs = attn.head_dim, attn.kv_heads, []
    u, v_shift = attn.shift.weight.view(2, attn.heads, d)
    places = torch.arange(attn.num_distances)[:, None] / 10_000 ** (torch.arange(0, x.shape[1], 2) / x.shape[1])
    waves = torch.stack([places.sin(), places.cos()], dim=-1).flatten(1)
    r = (waves @ attn.relative.weight.T).view(-1, kv, d)
    for start in range(0, len(x), attn.kind.segment):
        memory, segment = x[max(0, start - attn.kind.memory) : start], x[start : start + attn.kind.segment]
        rows = torch.cat([memory, segment])
        q, k, v = attn.qkv(rows).view(len(rows), -1, d).split([attn.heads, kv, kv], dim=1)
        for i in range(len(memory), len(rows)):
            for head in range(attn.heads):
                own = head // (attn.heads // kv)
                ages = i - torch.arange(i + 1)
                scores = k[: i + 1, own] @ (q[i, head] + u[head]) + r[ages, own] @ (q[i, head] + v_shift[head])
                outs.append((scores / math.sqrt(d)).softmax(0) @ v[: i + 1, own])
    mixed: Tensor = attn.out(torch.stack(outs).view(len(x), -1))
    return mixed


@pytest.mark.parametrize("word", ["recurrent-memory:16:24", "recurrent-memory:32:0", "recurrent-memory:7:5"])
def test_memory_is_recomputing_the_segments(word: str) -> None:
    attn, x = network(word).layers[0].attn, torch.randn(150, TINY.hidden_size)
    assert isinstance(attn, MemoryAttention)
    mixed = attn(x, None, DenseAttention(shape(word), 1, 150))
    torch.testing.assert_close(mixed, segment_by_segment(attn, x), atol=1e-5, rtol=1e-4)


def test_an_lstm_is_torchs() -> None:
    attn, x = network("lstm:24").layers[0].attn, torch.randn(1, 20, TINY.hidden_size)
    assert isinstance(attn, LstmMixer)
    theirs = nn.LSTM(TINY.hidden_size, 24, batch_first=True)
    theirs.weight_ih_l0, theirs.weight_hh_l0 = attn.input.weight, attn.recurrent.weight
    theirs.bias_ih_l0, theirs.bias_hh_l0 = attn.input.bias, nn.Parameter(torch.zeros(96))
    mixed = attn(x[0], None, DenseAttention(shape("lstm:24"), 1, 20))
    torch.testing.assert_close(mixed, attn.out(theirs(x)[0][0]))


def test_linear_attention_is_the_sum_that_its_features_say() -> None:
    attn, config = network("linear:16").layers[0].attn, shape("linear:16")
    assert isinstance(attn, LinearAttention)
    x, d, rows = torch.randn(70, TINY.hidden_size), TINY.head_dim, []
    q, k, v = attn.qkv(x).view(70, -1, d).split([4, 2, 2], dim=1)
    features_q, features_k = attn.features(q * d**-0.25, True), attn.features(k * d**-0.25, False)
    for p in range(70):
        for head in range(4):
            weights = features_k[: p + 1, head // 2] @ features_q[p, head]
            rows.append(weights @ v[: p + 1, head // 2] / weights.sum())
    mixed = attn(x, None, DenseAttention(config, 1, 70))
    torch.testing.assert_close(mixed, attn.out(torch.stack(rows).view(70, -1)), atol=1e-5, rtol=1e-3)


def test_features_estimate_the_exponential_and_are_orthogonal() -> None:
    torch.manual_seed(0)
    features, q, k = Features(4096, 8, 0), torch.randn(64, 1, 8) / 4, torch.randn(64, 1, 8) / 4
    estimated = (features(q, False) * features(k, False)).sum(-1)
    torch.testing.assert_close(estimated, (q * k).sum(-1).exp(), rtol=0.15, atol=0.0)
    first = features.get_buffer("weight")[:8]
    assert (first @ first.T - torch.diag(first.square().sum(1))).abs().max() < 1e-4


def test_a_long_table_of_turns_is_the_short_one_and_reaches_a_million() -> None:
    at = torch.tensor([0, 5, 2047, 2048, 4095])
    for long, short in zip(
        LongRotary(TINY.rope, 8, 4096)(at, torch.float32), Rotary(TINY.rope, 8, 4096)(at, torch.float32), strict=True
    ):
        torch.testing.assert_close(long, short, atol=1e-4, rtol=0)
    cos, _ = LongRotary(TINY.rope, 8, 2**20)(torch.tensor([2**20 - 1]), torch.float32)
    assert abs(cos[0, 0, 0] - math.cos(2**20 - 1)) < 1e-5


def test_kinds_that_cannot_share_are_refused_the_prefix_cache(make_engine: MakeEngine) -> None:
    for word, shares in (("full", True), ("window:40", False), ("full,lstm:24", False)):
        assert make_engine(network(word)).config.prefix_cache is shares


def test_how_long_a_sequence_may_be() -> None:
    assert [shape(word).longest > 10**6 for word in ("full", "linear:16,full", "linear:16", "window:40:4:2")] == [
        False,
        False,
        True,
        True,
    ]
    assert read_kind("window:40") == Window(40)
