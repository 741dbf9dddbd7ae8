"""The runner for a GPU, on a CPU: with operations in plain PyTorch, and recordings that simply compute again.

What is held to the plain runner here is everything but the kernels and CUDA graphs themselves: seats, padding, ids that
stay on the device, steps started ahead, drawing without waiting.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.cache.store import PagedStore
from model.config import EngineConfig, ModelConfig
from model.engine.engine import Engine
from model.engine.fast import FastRunner, row_counts
from model.nn.batch import RaggedBatch
from model.nn.decoder import Decoder
from model.nn.ops import Heads, Ops
from model.request import Request, SamplingParams
from model.tokenizer import Tokenizer
from tests.model.conftest import TINY, MakeEngine, random_decoder
from tests.model.test_engine import mixed_requests, outputs, run, sharing_requests


class PlainRagged(Ops):
    """A ragged batch in the plainest form: each row gathers its own keys."""

    def __init__(self, config: ModelConfig, store: PagedStore, batch: RaggedBatch, fixed: bool = False) -> None:
        self.config, self.store, self.batch = config, store, batch

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = heads.finish()
        real = self.batch.slots >= 0
        self.store.write(layer, self.batch.slots[real], k[real], v[real])
        self._check_pieces()
        mixed = torch.zeros_like(q)
        for row in real.nonzero()[:, 0].tolist():
            mixed[row] = self._row(layer, row, q[row])
        return mixed

    def _row(self, layer: int, row: int, q: Tensor) -> Tensor:
        """Mixed values [heads, d] of one row's queries."""
        batch, size, position = self.batch, self.store.block_size, int(self.batch.positions[row])
        window = self.config.window(layer) or position + 1
        at = torch.arange(max(0, position + 1 - window), position + 1)
        slots = batch.tables[batch.seats[row], at // size].long() * size + at % size
        k, v = (cache[layer].flatten(1, 2)[:, slots] for cache in (self.store.keys, self.store.values))
        q = q.view(self.config.num_kv_heads, -1, self.config.head_dim)
        weights = (q @ k.transpose(1, 2) * self.config.head_dim**-0.5).softmax(-1)
        mixed: Tensor = weights @ v
        return mixed.view(self.config.num_heads, self.config.head_dim)

    def _check_pieces(self) -> None:
        """Pieces cover every row but the single ones, once, and say where they are."""
        rows = list(range(self.batch.num_single))
        for seat, first, num, position in self.batch.pieces.tolist():
            assert self.batch.seats[first : first + num].eq(seat).all()
            assert self.batch.positions[first : first + num].tolist() == list(range(position, position + num))
            rows += range(first, first + num)
        assert rows == list(range(len(self.batch.token_ids)))


@pytest.fixture
def make_fast(byte_tokenizer: Tokenizer) -> MakeEngine:
    """As `make_engine`, with the fast runner."""

    def make(decoder: Decoder | None = None, **changes: int) -> Engine:
        settings = {"max_model_len": 512, "num_blocks": 256, **changes}
        config = EngineConfig(**settings)  # type: ignore[arg-type]
        decoder = decoder or random_decoder(TINY)
        return Engine(decoder, byte_tokenizer, config, FastRunner(decoder, config, PlainRagged, lambda step: step))

    return make


def simple_requests(num: int, max_prompt: int = 60) -> list[Request]:
    """Without penalties: steps that may be started ahead."""
    requests = mixed_requests(num, max_prompt)
    neutral = [replace(r.sampling, repetition_penalty=1.0, frequency_penalty=0.0) for r in requests]
    return [replace(r, sampling=sampling) for r, sampling in zip(requests, neutral, strict=True)]


@pytest.mark.parametrize(
    "changes", [{}, {"max_batch_tokens": 17}, {"num_blocks": 30, "block_size": 4}, {"max_num_seqs": 5}]
)
@pytest.mark.parametrize("requests", [simple_requests(24), mixed_requests(24)], ids=["ahead", "mixed"])
def test_the_same_tokens_as_the_plain_runner(
    make_fast: MakeEngine, make_engine: MakeEngine, requests: list[Request], changes: dict[str, int]
) -> None:
    engine = make_fast(**changes)
    assert outputs(engine, requests) == outputs(make_engine(), requests)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert (engine.stats().preemptions_total > 0) == ("num_blocks" in changes)


@pytest.mark.parametrize("changes", [{}, {"max_batch_tokens": 37}, {"num_blocks": 70, "block_size": 4}])
def test_a_prefix_hit_gives_the_tokens_of_a_miss(
    make_fast: MakeEngine, make_engine: MakeEngine, changes: dict[str, int]
) -> None:
    requests = [replace(r, sampling=replace(r.sampling, repetition_penalty=1.0)) for r in sharing_requests(24)]
    plain = outputs(make_engine(prefix_cache=False), requests)
    engine = make_fast(**changes)
    assert outputs(engine, requests[:4]) | outputs(engine, requests[4:]) == plain
    assert engine.stats().prefix_found_total > 0


def test_windows_biases_and_learned_positions(make_fast: MakeEngine, make_engine: MakeEngine) -> None:
    config = replace(TINY, windows=(20, None), qk_norm=True, qkv_bias=True, norm="layernorm", position="learned")
    decoder, requests = random_decoder(config), simple_requests(6)
    assert outputs(make_fast(decoder), requests) == outputs(make_engine(decoder), requests)


def test_taking_over_in_the_middle_continues_the_same_text(make_fast: MakeEngine, make_engine: MakeEngine) -> None:
    requests = simple_requests(8)
    whole = outputs(make_engine(), requests)
    engine = make_fast()
    for request in requests:
        engine.add(request, so_far=whole[request.id][: len(whole[request.id]) // 2])
    deltas = run(engine)
    for request in requests:
        half = len(whole[request.id]) // 2
        assert sum((d.token_ids for d in deltas[request.id]), ()) == whole[request.id][half:]


def test_steps_overlap_and_none_is_computed_past_a_known_length(make_fast: MakeEngine) -> None:
    engine = make_fast()
    started: list[int] = []
    start = engine.runner.start
    engine.runner.start = lambda plan: started.append(plan.num_tokens) or start(plan)  # type: ignore
    engine.add(Request("a", (1, 2, 3), SamplingParams(max_tokens=4)))
    assert [len(engine.step()) for _ in range(4)] == [1, 1, 1, 1]
    assert started == [3, 1, 1, 1] and not engine.has_work()  # the last id is drawn, its row never computed
    engine.add(Request("b", (1, 2, 3), SamplingParams(max_tokens=9)))
    engine.step()
    assert len(started) == 6  # the prompt, and the step after it


def test_a_stop_id_costs_one_row_in_vain(make_fast: MakeEngine) -> None:
    [ids] = outputs(make_fast(), [Request("a", (65, 66), SamplingParams(max_tokens=9, seed=1))]).values()
    engine = make_fast()
    engine.add(Request("a", (65, 66), SamplingParams(max_tokens=9, seed=1, stop_token_ids=(ids[4],))))
    deltas = run(engine)["a"]
    assert sum((d.token_ids for d in deltas), ()) == ids[: ids.index(ids[4]) + 1]
    assert sum(d.finish is not None for d in deltas) == 1
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_cancelling_between_steps(make_fast: MakeEngine) -> None:
    engine = make_fast(max_batch_tokens=16)
    for request in mixed_requests(10):
        engine.add(request)
    for step in range(10):
        engine.step()
        engine.cancel(f"r{step}")
    assert not run(engine)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_network_that_breaks_ends_only_the_broken_request(make_fast: MakeEngine) -> None:
    decoder = random_decoder(replace(TINY, tied_head=False))
    decoder.embed.weight[7] = torch.nan
    engine = make_fast(decoder, num_blocks=8)
    for i in range(3):
        engine.add(Request(f"good{i}", (1, 2, 3), SamplingParams(max_tokens=5, logit_bias=((7, -100.0),))))
        engine.add(Request(f"bad{i}", (1, 7, 3), SamplingParams(max_tokens=5)))
    for id, parts in run(engine).items():
        [finish] = [d.finish for d in parts if d.finish is not None]
        assert (finish.error is not None) == id.startswith("bad")
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.runner.store.keys.isfinite().all()


def test_graphs_are_for_few_numbers_of_rows() -> None:
    assert row_counts(5) == [1, 2, 4, 5]
    assert row_counts(256)[-1] == 256 and len(row_counts(256)) < 20
