"""Embeddings and labels from the engine: what the rows say, the same alone, among others and in pieces."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import EngineConfig, ModelConfig
from model.engine.engine import Engine
from model.engine.native import NativeRunner
from model.engine.pace import Pace
from model.engine.scheduler import Scheduler
from model.engine.sequence import Sequence
from model.native import library
from model.nn.attention import DenseAttention
from model.nn.bert import Encoder, SpanAttention, text_positions
from model.nn.decoder import Decoder
from model.request import FinishReason, Request, SamplingParams
from model.tokenizer import Tokenizer
from tests.model.conftest import TINY, MakeEngine, random_decoder
from tests.model.test_engine import mixed_requests, run

BERT = ModelConfig(
    family="bert", role="encoder", vocab_size=256, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4,
    head_dim=8, intermediate_size=48, max_position=300, norm="layernorm", position="learned", activation="gelu",
    gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, num_segments=2, labels=("bad", "good", "neither"),
    pooling="mean",
)  # fmt: skip


def random_encoder() -> Encoder:
    torch.manual_seed(3)
    encoder = Encoder(BERT).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.normal_(std=0.3)
    return encoder


@pytest.fixture
def encode(byte_tokenizer: Tokenizer) -> Engine:
    return Engine(random_encoder(), byte_tokenizer, EngineConfig(max_model_len=300, max_batch_tokens=320))


def asking(task: str, num: int, longest: int, poolings: tuple[str, ...]) -> list[Request]:
    """Texts of many lengths; none draws, so there is nothing to limit."""
    rng, sampling = random.Random(5), SamplingParams(max_tokens=0)
    return [
        Request(
            f"{task}{i}", tuple(rng.randrange(256) for _ in range(rng.choice([1, rng.randint(2, longest), longest]))),
            sampling, task=task, pooling=poolings[i % len(poolings)],  # type: ignore[arg-type]
        )
        for i in range(num)
    ]  # fmt: skip


def results(engine: Engine, requests: list[Request]) -> dict[str, bytes]:
    """Each ends with one delta that has the result and nothing else."""
    for request in requests:
        engine.add(request)
    found = {}
    for id, deltas in run(engine).items():
        [*before, last] = deltas
        assert not any(delta.finish or delta.result for delta in before)
        if last.result:
            assert last.finish is not None and last.finish.reason is FinishReason.STOP and not last.token_ids
            found[id] = last.result
    return found


def numbers(result: bytes) -> Tensor:
    return torch.frombuffer(bytearray(result), dtype=torch.float32)


def hidden(decoder: Decoder, ids: tuple[int, ...]) -> Tensor:
    ops = DenseAttention(decoder.config, 1, len(ids))
    rows: Tensor = decoder(torch.tensor(ids), torch.arange(len(ids)), ops)
    return rows


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoders_embedding_is_made_of_its_final_rows(pooling: str, make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16, max_num_seqs=8)
    [request] = asking("embed", 1, 100, (pooling,))
    request = replace(request, prompt_ids=tuple(range(100)))
    rows = hidden(engine.runner.decoder, request.prompt_ids)  # type: ignore[arg-type]
    wanted = torch.nn.functional.normalize(rows[-1] if pooling == "last" else rows.mean(0), dim=0)
    torch.testing.assert_close(numbers(results(engine, [request])[request.id]), wanted, atol=1e-5, rtol=0)


def test_a_decoders_embedding_is_the_same_alone_and_among_others(make_engine: MakeEngine) -> None:
    asked, others = asking("embed", 10, 150, ("last", "mean")), mixed_requests(10)
    small = make_engine(max_batch_tokens=40, max_num_seqs=6)
    found = results(small, [each for pair in zip(asked, others, strict=True) for each in pair])
    large = make_engine(max_batch_tokens=512)
    alone = {request.id: results(large, [request])[request.id] for request in asked if request.id in found}
    assert len(found) == 10 and found == alone
    assert small.stats().num_free_blocks == 256


def test_a_text_that_was_preempted_begins_its_mean_again(make_engine: MakeEngine) -> None:
    [request] = asking("embed", 1, 150, ("mean",))
    request = replace(request, prompt_ids=tuple(range(180)))
    growing = Request("r", tuple(range(200, 216)), SamplingParams(temperature=0, max_tokens=70))
    engine = make_engine(max_batch_tokens=4, max_num_seqs=4, num_blocks=16)
    found = results(engine, [growing, request])
    assert engine.stats().preemptions_total > 0 and found == results(make_engine(), [request])


def test_only_the_last_row_may_come_from_what_was_found(make_engine: MakeEngine) -> None:
    engine, ids = make_engine(), tuple(range(90))
    last, mean = (Request(p, ids, SamplingParams(max_tokens=0), task="embed", pooling=p) for p in ("last", "mean"))
    fresh = results(engine, [mean]) | results(engine, [last])
    engine.add(again := replace(last, id="again"))
    [delta] = run(engine)["again"]
    assert delta.num_cached == 80 and delta.result == fresh["last"]
    assert results(engine, [replace(mean, id=again.id)])["again"] == fresh["mean"]


def test_the_native_core_gives_the_same_vectors(byte_tokenizer: Tokenizer, make_engine: MakeEngine) -> None:
    core = library.load()
    if core is None:
        pytest.skip("the native core has not been built")
    decoder = random_decoder(TINY)
    config = EngineConfig(max_model_len=512, num_blocks=64, max_batch_tokens=48, max_num_seqs=6)
    engine = Engine(decoder, byte_tokenizer, config, NativeRunner(decoder, config, core))
    asked = asking("embed", 8, 150, ("last", "mean"))
    found = results(engine, [*asked, *mixed_requests(6)])
    alone = {each.id: results(engine, [replace(each, id=each.id + "x")]) for each in asked}
    assert found == {id: vector[id + "x"] for id, vector in alone.items()}
    for id, vector in results(make_engine(), asked).items():
        torch.testing.assert_close(numbers(found[id]), numbers(vector), atol=1e-5, rtol=0)


def test_an_encoders_vectors_and_labels_are_those_of_its_network(encode: Engine) -> None:
    encoder = encode.runner.decoder
    assert isinstance(encoder, Encoder)
    for request in [*asking("embed", 3, 200, ("mean", "cls", "last")), *asking("classify", 2, 200, ("",))]:
        ids, ops = request.prompt_ids, SpanAttention([len(request.prompt_ids)])
        rows = encoder(torch.tensor(ids), text_positions(ops.lengths), ops)
        pooled = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}.get(request.pooling)
        if pooled is None:
            wanted = encoder.scores(rows[:1], ops).softmax(-1)[0]
        else:
            wanted = torch.nn.functional.normalize(pooled, dim=0)
        torch.testing.assert_close(numbers(results(encode, [request])[request.id]), wanted, atol=1e-5, rtol=0)


def test_an_encoders_texts_are_the_same_alone_and_among_others(encode: Engine) -> None:
    asked = [*asking("embed", 12, 300, ("mean", "cls")), *asking("classify", 12, 300, ("",))]
    found = results(encode, asked)
    assert len(found) == 24 and encode.stats().num_free_blocks == 0
    assert found == {each.id: results(encode, [each])[each.id] for each in asked}


def test_what_a_network_cannot_do_ends_as_an_error(encode: Engine, make_engine: MakeEngine) -> None:
    for engine, task in ((encode, "generate"), (make_engine(), "classify")):
        engine.add(Request("r", (1, 2), task=task))  # type: ignore[arg-type]
        [delta] = run(engine)["r"]
        assert delta.finish is not None and delta.finish.error is not None and f"can't {task}" in delta.finish.error


def test_a_text_longer_than_a_step_is_refused(encode: Engine) -> None:
    encode.add(Request("r", (1,) * 321, task="embed"))
    [delta] = run(encode)["r"]
    assert delta.finish is not None and "321 tokens" in str(delta.finish.error)


def test_a_number_that_is_not_finite_ends_its_own_text_only(encode: Engine) -> None:
    encoder = encode.runner.decoder
    encoder.embed.weight[7] = torch.inf
    good, bad = Request("good", (1, 2), task="embed"), Request("bad", (1, 7), task="embed")
    encode.add(good)
    encode.add(bad)
    ends = {id: deltas[-1] for id, deltas in run(encode).items()}
    assert ends["good"].result and not ends["bad"].result
    assert ends["bad"].finish is not None and ends["bad"].finish.reason is FinishReason.ERROR


def test_a_cancelled_text_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16, max_num_seqs=4)
    engine.add(Request("r", tuple(range(100)), task="embed", pooling="mean"))
    engine.step()
    engine.cancel("r")
    assert not engine.has_work() and engine.stats().num_free_blocks == 256


class Slow(Pace):
    """Leaves little to those who read."""

    def budget(self, num_decoding: int, num_reading: int, position: int = 0) -> int:
        return 10


def test_a_text_that_is_seen_whole_waits_for_a_step_that_holds_it_and_no_longer() -> None:
    scheduler = Scheduler(EngineConfig(max_batch_tokens=64))
    scheduler.pace = Slow(64)
    for id, length in (("a", 60), ("b", 1), ("c", 60)):
        scheduler.add(Sequence(Request(id, (1,) * length, task="embed"), 64, is_whole=True))
    plan = scheduler.plan()
    assert [(chunk.sequence.id, chunk.num_tokens, chunk.draws) for chunk in plan.chunks] == [
        ("a", 60, False),
        ("b", 1, False),
    ]
    assert plan.num_tokens == 61 and [each.sequence.id for each in scheduler.commit(plan, {})] == ["a", "b"]
    assert [chunk.sequence.id for chunk in scheduler.plan().chunks] == ["c"]
