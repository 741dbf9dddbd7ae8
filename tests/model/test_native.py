"""The native core against the plain runner: the same logits within rounding, and bitwise the same among others."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.native import NativeRunner
from model.engine.paths import make_runner
from model.engine.runner import Runner
from model.engine.scheduler import Chunk, StepPlan
from model.engine.sequence import Sequence
from model.families.registry import read_config
from model.native import build, library
from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder
from model.nn.quantized import Int8Weight
from model.request import Request, SamplingParams
from model.tokenizer import Tokenizer
from model.weights import load_decoder
from tests.model.conftest import TINY, MakeEngine, random_decoder, save_folder
from tests.model.test_engine import mixed_requests, outputs, run

BUNDLED = Path(__file__).parent.parent.parent / "model" / "bundled"
PROMPT = list(range(3, 250, 2))  # 124 ids: blocks of 16 and 64 end within it
GREEDY = SamplingParams(temperature=0.0, max_tokens=500)
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama-untied": {"tied_head": False, "mlp_bias": True, "out_bias": True, "qkv_bias": True},
    "mistral": {"windows": (20, 20), "num_heads": 8},
    "qwen2": {"qkv_bias": True, "windows": (None, 33)},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "gpt2": {"norm": "layernorm", "position": "learned", "gated_mlp": False, "activation": "gelu_tanh",
             "head_dim": 14, "num_kv_heads": 4, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "sinusoidal": {"position": "sinusoidal", "gated_mlp": False, "activation": "relu", "head_dim": 7},
    "odd": {"hidden_size": 70, "num_heads": 9, "num_kv_heads": 3, "head_dim": 34, "intermediate_size": 101,
            "vocab_size": 259, "activation": "gelu"},
    "wide": {"num_heads": 22, "num_kv_heads": 2, "head_dim": 80},
    "broad": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 144},
    "middling": {"num_heads": 6, "num_kv_heads": 6, "head_dim": 48, "windows": (None, 50)},
}  # fmt: skip
Load = Callable[[str | None], ctypes.CDLL]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The core for one kind of processor, None for this one; built here if the installation has not."""
    if build.find_compiler() is None and library.load() is None:
        pytest.skip("NO C++ COMPILER: the native core is not tested")
    folder = build.HERE
    if library.load() is None:
        build.build(folder := tmp_path_factory.mktemp("core"))

    def found(target: str | None = None) -> ctypes.CDLL:
        lowest = library.load(folder, "portable")
        if target and lowest and list(build.TARGETS).index(target) > lowest.millrace_level():
            pytest.skip(f"this processor has no {target}")
        core = library.load(folder, target)
        assert core is not None
        return core

    return found


class Steps:
    """Steps of a runner, chosen by hand: each sequence's ids are known, and every step asks for its last logits."""

    def __init__(self, runner: Runner | NativeRunner, block_size: int = 16, scatter: int = 1) -> None:
        self.runner, self.size, self.scatter = runner, block_size, scatter
        self.sequences: dict[str, Sequence] = {}
        self.used = 0

    def step(self, chunks: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Append ids to sequences -> the logits that follow each."""
        made = []
        for name, ids in chunks.items():
            old = self.sequences.get(name)
            known = [*old.request.prompt_ids, *ids] if old else ids
            sequence = Sequence(Request(name, tuple(known), GREEDY), 512)
            sequence.blocks = old.blocks if old else []
            while len(sequence.blocks) * self.size < len(known):
                sequence.blocks.append(self.used * self.scatter % 61)
                self.used += 1
            self.sequences[name] = sequence
            made.append(Chunk(sequence, len(known) - len(ids), len(ids), True))
        self.runner.start(StepPlan(tuple(made), sum(map(len, chunks.values()))))
        return {name: row.clone() for name, row in zip(chunks, self._logits(), strict=False)}

    def _logits(self) -> torch.Tensor:
        assert isinstance(self.runner, NativeRunner)
        return self.runner._logits


def plain_logits(decoder: Decoder, ids: list[int], ops: type[DenseAttention] = DenseAttention) -> torch.Tensor:
    """Logits [len(ids), vocab] of one sequence, by the network itself over whole sequences."""
    dense = ops(decoder.config, 1, len(ids))
    with torch.inference_mode():
        return decoder.logits(decoder(torch.tensor(ids), torch.arange(len(ids)), dense), dense)


def native(decoder: Decoder, core: ctypes.CDLL, *, int8: bool = False, **changes: object) -> NativeRunner:
    chosen = {"max_model_len": 512, "num_blocks": 61, "quantize": "int8" if int8 else "none", **changes}
    return NativeRunner(decoder, EngineConfig(**chosen), core)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", build.targets())
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_plain_network(load: Load, name: str, target: str) -> None:
    decoder = random_decoder(replace(TINY, **FAMILIES[name]))  # type: ignore[arg-type]
    expected = plain_logits(decoder, PROMPT)
    for size in (16, 64):
        steps, at = Steps(native(decoder, load(target), block_size=size), size, scatter=7), 0
        for width in (1, 15, 1, 47, 1, 31, 28):
            at += width
            logits = steps.step({"a": PROMPT[at - width : at]})["a"]
            assert (logits - expected[at - 1]).abs().max() < 1e-4
        assert at == len(PROMPT)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, None) for name in ("llama", "mistral", "gpt2", "odd", "qwen3", "wide", "broad", "middling")),
        *(("llama", each) for each in build.targets()),
    ],
)
def test_a_row_depends_on_no_other_to_the_bit(load: Load, name: str, target: str | None, precision: str) -> None:
    decoder = random_decoder(replace(TINY, **FAMILIES[name]))  # type: ignore[arg-type]
    dtype = "bfloat16" if precision == "bfloat16" else "float32"

    def make() -> Steps:
        return Steps(native(decoder, load(target), int8=precision == "int8", dtype=dtype), scatter=3)

    alone = make()
    alone.step({"a": PROMPT[:100]})
    expected = [alone.step({"a": [i]})["a"] for i in (5, 6, 7)]
    for num_others in (1, 2, 7, 13, 31, 63):
        torch.manual_seed(num_others)
        crowd = make()
        crowd.step({"a": PROMPT[:37], **{f"b{i}": PROMPT[i : i + 1 + i % 5] for i in range(min(num_others, 20))}})
        crowd.step({"b0": [9, 8], "a": PROMPT[37:100]})
        for token_id, row in zip((5, 6, 7), expected, strict=True):
            others = {f"b{i}": [1 + i] for i in range(min(num_others, 20))} | {"c": PROMPT[: max(1, num_others - 20)]}
            assert torch.equal(crowd.step({**others, "a": [token_id]})["a"], row)
            del crowd.sequences["c"]


@pytest.fixture
def make_native(byte_tokenizer: Tokenizer, load: Load) -> MakeEngine:
    """As `make_engine`, with the native runner."""

    def make(decoder: Decoder | None = None, **changes: int) -> Engine:
        config = EngineConfig(**{"max_model_len": 512, "num_blocks": 256, **changes})  # type: ignore[arg-type]
        decoder = decoder or random_decoder(TINY)
        return Engine(decoder, byte_tokenizer, config, NativeRunner(decoder, config, load(None)))

    return make


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "odd", "qwen3", "wide", "broad", "middling"])
def test_a_prompt_in_single_steps_gives_the_bits_of_one_in_pieces(load: Load, name: str, precision: str) -> None:
    """A single row is added with vectors where several go through the matrix unit: in the same order, then."""
    decoder = random_decoder(replace(TINY, **FAMILIES[name]))  # type: ignore[arg-type]
    dtype = "float32" if precision == "float32" else "bfloat16"
    pieces, single = (Steps(native(decoder, load(None), int8=precision == "int8", dtype=dtype)) for _ in range(2))
    expected = [pieces.step({"a": PROMPT[at : at + 31]})["a"] for at in range(0, 124, 31)]
    found = [single.step({"a": [token_id]})["a"] for token_id in PROMPT]
    assert all(torch.equal(found[at], row) for at, row in zip(range(30, 124, 31), expected, strict=True))


@pytest.mark.parametrize("changes", [{}, {"max_batch_tokens": 17}, {"num_blocks": 8}, {"block_size": 32}])
def test_the_same_tokens_as_the_plain_engine(
    make_native: MakeEngine, make_engine: MakeEngine, changes: dict[str, int]
) -> None:
    requests = mixed_requests(24)
    engine = make_native(**changes)
    assert outputs(engine, requests) == outputs(make_engine(), requests)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_preempted_request_goes_on_as_if_nothing_had_been(make_native: MakeEngine) -> None:
    requests = [Request(f"r{i}", (1, 2 + i), SamplingParams(max_tokens=60, seed=i)) for i in range(6)]
    engine = make_native(num_blocks=8)
    assert outputs(engine, requests) == outputs(make_native(), requests)
    assert engine.stats().preemptions_total > 0


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_do_not_show(make_native: MakeEngine, num_threads: int) -> None:
    requests = mixed_requests(12, max_prompt=200)
    alone = outputs(make_native(), requests)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert outputs(make_native(), requests) == alone
    finally:
        torch.set_num_threads(before)


def test_a_network_that_breaks_ends_only_the_broken_request(make_native: MakeEngine) -> None:
    decoder = random_decoder(replace(TINY, tied_head=False))
    decoder.embed.weight[7] = torch.nan
    engine = make_native(decoder, num_blocks=8)
    for i in range(3):
        engine.add(Request(f"good{i}", (1, 2, 3), SamplingParams(max_tokens=5, logit_bias=((7, -100.0),))))
        engine.add(Request(f"bad{i}", (1, 7, 3), SamplingParams(max_tokens=5)))
    for id, parts in run(engine).items():
        [finish] = [delta.finish for delta in parts if delta.finish is not None]
        assert (finish.error is not None) == id.startswith("bad")
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.runner.store.keys.isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_number_that_is_not_finite_is_never_hidden(load: Load, precision: str) -> None:
    decoder = random_decoder(replace(TINY, tied_head=False))
    decoder.embed.weight[7, 3] = torch.inf
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    runner = native(decoder, load(None), int8=precision == "int8", dtype=dtype)
    Steps(runner).step({"good": [1, 2], "bad": [1, 7, 2]})
    assert list(runner._finite[:2]) == [1, 1] and runner._best[0] >= 0
    assert not runner._finite[3]


class Int8Attention(DenseAttention):
    """The core's int8 arithmetic in the plainest form."""

    def linear(self, x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor)
        of_rows, of_channels = x.abs().amax(1, keepdim=True) / 127, weight.abs().amax(1, keepdim=True) / 127
        sums = (x / of_rows).round().double() @ (weight / of_channels).round().double().T
        out = sums.float() * of_rows * of_channels.T
        return out if bias is None else out + bias


@pytest.mark.parametrize("target", build.targets())
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_and_int8_stay_near(load: Load, name: str, target: str) -> None:
    decoder = random_decoder(replace(TINY, **FAMILIES[name]))  # type: ignore[arg-type]
    exact, rounded = plain_logits(decoder, PROMPT)[-1], plain_logits(decoder, PROMPT, Int8Attention)[-1]
    for int8, dtype, expected, error in ((False, "bfloat16", exact, 0.05), (True, "float32", rounded, 0.01)):
        logits = Steps(native(decoder, load(target), int8=int8, dtype=dtype)).step({"a": PROMPT})["a"]
        assert (logits - expected).norm() / expected.norm() < error, dtype


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_weights_that_are_int8_already_are_packed_as_they_are(load: Load, tmp_path: Path, name: str) -> None:
    folder = save_folder(random_decoder(replace(TINY, **FAMILIES[name])), tmp_path / name)  # type: ignore[arg-type]
    decoder = load_decoder(folder, read_config(folder), torch.float32, torch.device("cpu"), quantized=True)
    expected = plain_logits(decoder, PROMPT)[-1]
    logits = Steps(native(decoder, load(None), int8=True)).step({"a": PROMPT})["a"]
    assert (logits - expected).norm() / expected.norm() < 0.01


def test_the_bundled_model_writes_the_same_64_tokens(load: Load) -> None:
    decoder = load_decoder(BUNDLED, read_config(BUNDLED), torch.float32, torch.device("cpu"))
    tokenizer, config = Tokenizer.load(BUNDLED), EngineConfig(num_blocks=16)
    request = Request("a", tuple(tokenizer.encode("Once upon a time")), SamplingParams(temperature=0.0, max_tokens=64))
    plain = outputs(Engine(decoder, tokenizer, config, Runner(decoder, config)), [request])["a"]
    runner = NativeRunner(decoder, config, load(None))
    assert outputs(Engine(decoder, tokenizer, config, runner), [request])["a"] == plain and len(plain) == 64


def test_dropped_weights_leave_their_shapes(load: Load) -> None:
    decoder = random_decoder(TINY)
    expected = plain_logits(decoder, PROMPT)[-1]
    config = EngineConfig(max_model_len=512, num_blocks=61)
    runner = NativeRunner(decoder, config, load(None), drop=True)
    assert all(parameter.is_meta for parameter in decoder.layers.parameters() if parameter.dim() > 1)
    assert (Steps(runner).step({"a": PROMPT})["a"] - expected).abs().max() < 1e-4


def test_what_the_core_cannot_do_is_left_to_the_plain_runner(caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner(random_decoder(TINY), EngineConfig(num_blocks=8, block_size=4))
    assert isinstance(runner, Runner) and "multiple of 16" in caplog.text


def test_a_library_of_other_sources_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "core_portable_000000000000.so").write_bytes(b"")
    assert library.load(tmp_path) is None
