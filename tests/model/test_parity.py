"""The network against transformers on tiny random checkpoints, and against itself in every order of computing."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from model.config import ModelConfig
from model.families.registry import FAMILIES, read_config
from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder
from model.weights import load_decoder
from tests.model.helpers_forward import CPU, Paged, in_chunks

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K"
LONG = 150  # tokens: more than one tile of the paged attention

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "max_position_embeddings": 200,
}
THREE = {**SMALL, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MQA = {"num_attention_heads": 4, "num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_positions": 200}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
THETA = {"rope_type": "default", "rope_theta": 1e6}
UPPER = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
MIXED = {
    "use_sliding_window": True,
    "sliding_window": 9,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT2, "n_head": 4}),
    "gpt2-untied-odd-heads": ("GPT2", {**GPT2, "n_head": 16, "n_inner": 40, "tie_word_embeddings": False}),
    "gpt2-erf-gelu-one-head": ("GPT2", {**GPT2, "n_head": 1, "activation_function": "gelu"}),
    "llama": ("Llama", {**SMALL, **HEADS}),
    "llama-gqa-tied-biases": ("Llama", {**SMALL, **GQA, **TIED, "attention_bias": True, "mlp_bias": True}),
    "llama-mqa-llama3-rope": ("Llama", {**SMALL, **MQA, "rope_parameters": LLAMA3}),
    "llama-linear-rope-head-20": ("Llama", {**SMALL, **GQA, "head_dim": 20, "rope_parameters": LINEAR}),
    "mistral-window": ("Mistral", {**SMALL, **GQA, "sliding_window": 7}),
    "mistral-wide-window-tied": ("Mistral", {**SMALL, **MQA, **TIED, "sliding_window": 130}),
    "mistral-no-window-head-6": ("Mistral", {**SMALL, **HEADS, "sliding_window": None, "head_dim": 6}),
    "qwen2": ("Qwen2", {**SMALL, **GQA, "rope_parameters": THETA}),
    "qwen2-upper-windows-tied": ("Qwen2", {**THREE, **MQA, **TIED, **UPPER}),
    "qwen3": ("Qwen3", {**SMALL, **GQA, "head_dim": 20}),
    "qwen3-layer-types-biases": ("Qwen3", {**THREE, **HEADS, **MIXED, **TIED, "head_dim": 10, "attention_bias": True}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products: a second thread only waits. The test of row independence sets its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(network: torch.nn.Module, scale: float) -> None:
    """Weights large enough that attention and logits are far from uniform; biases and norms are random too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale + parameter.data.mean().round())


@pytest.fixture(scope="session", params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, list[int], torch.Tensor]:
    """Our decoder of a checkpoint that transformers saved, some ids, and the logits that transformers gives them."""
    name, settings = CASES[request.param]
    config = getattr(transformers, f"{name}Config")(**settings)
    theirs = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    randomise(theirs, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ids = torch.randint(97, (LONG,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    return load_decoder(folder, read_config(folder), torch.float32, CPU), ids, expected


def dense(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        ops = DenseAttention(decoder.config, 1, len(ids))
        return decoder.logits(decoder(torch.tensor(ids), torch.arange(len(ids)), ops), ops)


WAYS: dict[str, Callable[[Decoder, list[int]], torch.Tensor]] = {
    "whole": dense,
    "chunks": lambda decoder, ids: in_chunks(decoder, ids, [1, 30, 5, 64, 3, 17]),
    "tokens": lambda decoder, ids: in_chunks(decoder, ids, [*[1] * 12, 108, 1]),  # all at a time: see row independence
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_equal_transformers(pair: tuple[Decoder, list[int], torch.Tensor], way: str) -> None:
    decoder, ids, expected = pair
    assert expected.std() > 1  # random weights must say something, or nothing is compared
    torch.testing.assert_close(WAYS[way](decoder, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_what_we_write(model_type: str, tmp_path: Path) -> None:
    sizes = {**GPT2, "n_head": 4} if model_type == "gpt2" else {**SMALL, **GQA, **MIXED, "num_hidden_layers": 3}
    family = FAMILIES[model_type]
    decoder = Decoder(family.read_config({**sizes, "rope_parameters": LLAMA3})).eval()
    randomise(decoder, 0.2)
    state, tensors = decoder.state_dict(), {}
    for rule in family.rules(decoder.config):
        for name, part in zip(rule.theirs, state[rule.ours].split(rule.sizes), strict=True):
            tensors[name] = (part.t() if rule.transpose else part).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(family.write_config(decoder.config)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = list(range(40))
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(dense(decoder, ids), expected, atol=1e-4, rtol=0)


def test_shards_of_transformers_load(tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **GQA))
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    decoder = load_decoder(tmp_path, read_config(tmp_path), torch.float32, CPU)
    assert torch.equal(decoder.embed.weight, theirs.model.embed_tokens.weight)


LLAMA_LIKE = ModelConfig(
    family="llama",
    vocab_size=300,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=172,
    max_position=200,
)
GPT2_LIKE = replace(
    LLAMA_LIKE,
    norm="layernorm",
    position="learned",
    gated_mlp=False,
    activation="gelu_tanh",
    qkv_bias=True,
    num_kv_heads=4,
)
WINDOWED = replace(LLAMA_LIKE, windows=(40, None), num_kv_heads=1, qk_norm=True)


# With two threads only the counts at which products change their path: the machine may be busy, and threads wait.
ONE_LAYER = replace(LLAMA_LIKE, num_layers=1)
FEW = (*range(2, 14), 17, 33, 64)


@pytest.mark.parametrize(
    ("config", "threads", "row_counts"),
    [(LLAMA_LIKE, 1, range(2, 65)), (GPT2_LIKE, 1, range(2, 65)), (WINDOWED, 1, range(2, 65)), (ONE_LAYER, 2, FEW)],
    ids=["llama", "gpt2", "windowed", "llama-2-threads"],
)
def test_rows_do_not_depend_on_batch_mates_or_chunks(
    config: ModelConfig, threads: int, row_counts: Sequence[int]
) -> None:
    """One sequence token by token, alone, is equal to the bit to: one pass, uneven chunks, and single tokens in passes
    of 2 to 64 rows, with mates that decode behind contexts of other lengths and one that prefills."""
    torch.set_num_threads(threads)
    decoder = Decoder(config).eval()
    randomise(decoder, 0.2)
    draw = torch.Generator().manual_seed(3)
    ids, *others = [torch.randint(300, (180,), generator=draw).tolist() for _ in range(4)]
    start = 160 - len(row_counts)
    alone = in_chunks(decoder, ids[:160], [1] if threads == 1 else [start - 4, 1])
    assert torch.equal(in_chunks(decoder, ids[:160], [160]), alone)
    assert torch.equal(in_chunks(decoder, ids[:160], [1, 9, 64, 3, 17]), alone)

    paged = Paged(decoder, 4, 180)
    first = paged.forward({0: ids[:start], 1: others[0][:60], 2: others[1][:3]})[0]
    assert torch.equal(first, alone[:start])
    for at, num_rows in enumerate(row_counts, start=start):
        step = {seq: [at] for seq in (1, 2)[: num_rows - 1]}
        paged.lengths[3] = at % 7  # a mate that starts anew in blocks that it has used before
        chunk = {3: others[2][: num_rows - 1 - len(step)]} if num_rows - 1 > len(step) else {}
        got = paged.forward({**step, **chunk, 0: [ids[at]]})[0]
        assert torch.equal(got, alone[at : at + 1]), num_rows


@pytest.mark.skipif(not STORIES.is_dir(), reason="the reference checkpoint is not here")
def test_stories260k_is_reproduced_token_for_token() -> None:
    config = read_config(STORIES)
    decoder = load_decoder(STORIES, config, torch.float32, CPU)
    cases = json.loads((STORIES / "expected_greedy.json").read_text())["cases"]
    outputs: list[list[int]] = [[] for _ in cases]
    paged, step = Paged(decoder, len(cases), 160), {i: case["prompt_ids"] for i, case in enumerate(cases)}
    while step:
        logits = paged.forward(step)
        for i in step:
            outputs[i].append(int(logits[i][-1].argmax()))
        step = {i: outputs[i][-1:] for i in step if len(outputs[i]) < len(cases[i]["new_ids"])}
    assert outputs == [case["new_ids"] for case in cases]
