"""config.json and generation_config.json: what is understood, what is refused, and writing it back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import CheckpointError, GenerationDefaults, ModelConfig, Rope, RopeScaling
from model.families.registry import FAMILIES, read_config, read_generation_defaults

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


def read(model_type: str = "llama", **changes: Any) -> ModelConfig:
    raw = GPT2 if model_type == "gpt2" else {**SIZES, "model_type": model_type}
    return FAMILIES[model_type].read_config({**raw, **changes})


def test_a_gpt2_config_may_leave_nearly_everything_out() -> None:
    config = read("gpt2", n_inner=None, bos_token_id=50256, eos_token_id=50256)
    assert (config.norm, config.position, config.activation, config.tied_head) == (
        "layernorm",
        "learned",
        "gelu_tanh",
        True,
    )
    assert (config.intermediate_size, config.num_kv_heads, config.head_dim) == (256, 4, 16)
    assert config.qkv_bias and config.out_bias and config.mlp_bias and not config.gated_mlp
    assert (config.bos_id, config.eos_ids) == (None, ())  # ids the network has no row for


def test_a_llama_config_may_leave_much_out() -> None:
    config = read(head_dim=None, num_key_value_heads=None, pretraining_tp=1, some_new_key={"a": 1})
    assert (config.head_dim, config.num_kv_heads, config.norm_eps, config.tied_head) == (16, 4, 1e-6, False)
    assert (config.rope, config.windows, config.dtype) == (Rope(), (), "float32")


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        ({"rope_theta": 5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(5, RopeScaling("linear", 2))),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, Rope(1e4, RopeScaling("linear", 2))),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            Rope(5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 256)),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}, "rope_theta": 8.0},
            Rope(7.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 256)),
        ),
    ],
)
def test_both_spellings_of_rope(changes: dict[str, Any], rope: Rope) -> None:
    assert read(**changes).rope == rope


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("mistral", {"sliding_window": 9}, (9, 9, 9)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {}, (4096, 4096, 4096)),
        ("qwen2", {"sliding_window": 9}, ()),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (None, 9, 9)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9}, ()),  # windows begin at layer 28
        ("qwen3", {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 3}, ()),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 2,
            },
            (9, None, None),
        ),
    ],
)
def test_windows(model_type: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(model_type, **changes).windows == windows


@pytest.mark.parametrize(("key", "value"), [("torch_dtype", "bfloat16"), ("dtype", "bfloat16")])
def test_both_spellings_of_dtype(key: str, value: str) -> None:
    assert read(**{key: value}).dtype == "bfloat16"


def test_switches_of_the_families() -> None:
    llama = read("llama", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias, llama.qk_norm) == (True, True, True, False)
    qwen2 = read("qwen2")
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    qwen3 = read("qwen3", attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 128)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"hidden_size": None}, "hidden_size is null, expected a whole number of at least 1"),
        ("llama", {"hidden_size": "64"}, 'hidden_size is "64", expected a whole number'),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, expected"),
        ("llama", {"num_hidden_layers": 10**9}, "expected a whole number of at least 1 and at most 10000"),
        ("llama", {"max_position_embeddings": 10**12}, "expected a whole number of at least 1 and at most 16777216"),
        ("llama", {"vocab_size": True}, "vocab_size is true, expected"),
        ("llama", {"hidden_size": 66}, "hidden_size is 66, expected a multiple of num_attention_heads, 4"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads, 4"),
        ("llama", {"head_dim": 15}, "head_dim is 15, expected an even number"),
        ("llama", {"hidden_act": "quick_gelu"}, 'hidden_act is "quick_gelu", expected one of silu, '),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, expected a number above 0"),
        ("llama", {"rope_theta": -1}, "rope_theta is -1, expected a number of at least 1"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
            'rope_type is "yarn", expected one of default, ',
        ),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            'rope_scaling: type is "dynamic", expected one of',
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ("llama", {"rope_scaling": 2.0}, "rope_scaling is 2.0, expected an object or null"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention is {}, expected one setting for all"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, expected 1.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
        ("llama", {"attention_bias": "no"}, 'attention_bias is "no", expected true or false'),
        ("llama", {"dtype": "float8_e4m3fn"}, 'dtype is "float8_e4m3fn", expected one of float32, bfloat16, float16'),
        ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id is [1, "),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is "),
        ("mistral", {"attention_bias": True}, "attention_bias is true, expected false"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, expected"),
        ("qwen2", {"layer_types": ["full_attention"]}, "expected one item for each of 3 layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "expected a list of full_attention, sliding_attention"),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 3},
            "sliding_window is 4096, expected a whole number with use_",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true, expected false"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is false, expected true"),
    ],
)
def test_refusals_name_key_found_and_expected(model_type: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(model_type, **changes)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [
        read("gpt2", n_inner=100, eos_token_id=3),
        read("llama", rope_scaling={"rope_type": "llama3", **LLAMA3}, dtype="bfloat16", tie_word_embeddings=True),
        read("llama", rope_scaling={"type": "linear", "factor": 2}, attention_bias=True, eos_token_id=[5, 6]),
        read("mistral", sliding_window=9, bos_token_id=1),
        read("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
        read("qwen3", head_dim=20),
    ],
    ids=lambda config: config.family,
)
def test_what_is_written_reads_back(config: ModelConfig) -> None:
    family = FAMILIES[config.family]
    assert family.read_config(json.loads(json.dumps(family.write_config(config)))) == config


@pytest.mark.parametrize("change", [{"norm": "layernorm"}, {"qk_norm": True}, {"windows": (9, None, None)}])
def test_a_family_refuses_to_write_what_it_has_no_word_for(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"a llama checkpoint can't express {next(iter(change))}="):
        FAMILIES["llama"].write_config(replace(read(), **change))


def folder_with(path: Path, **files: object) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_eos_ids_of_both_files_count(tmp_path: Path) -> None:
    folder_with(
        tmp_path, config={**SIZES, "model_type": "llama", "eos_token_id": 2}, generation_config={"eos_token_id": [7, 2]}
    )
    assert read_config(tmp_path).eos_ids == (2, 7)


def test_generation_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    folder_with(tmp_path, generation_config={"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": None})
    assert read_generation_defaults(tmp_path) == GenerationDefaults(temperature=0.6, top_k=20)
    folder_with(tmp_path, generation_config={"top_p": 1.5})
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: top_p is 1.5, expected a number above 0 and at"
    ):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config.json: can't be read \(No such file"),
        ("{", "config.json: not valid JSON"),
        ("[" * 100_000, "config.json: not valid JSON"),
        ("[1]", r"config.json: found \[1\], expected a JSON object"),
        ("{}", "config.json: model_type is missing, expected one of gpt2, llama"),
        ('{"model_type": "mamba"}', 'model_type is "mamba", expected one of gpt2'),
    ],
)
def test_a_config_file_that_says_nothing_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        folder_with(tmp_path, config=content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_a_wrong_path_is_answered_with_the_nearest_right_one(tmp_path: Path) -> None:
    (tmp_path / "storyteller").mkdir()
    with pytest.raises(CheckpointError, match=r"storytelller: no such model folder; did you mean .*/storyteller\?"):
        read_config(tmp_path / "storytelller")
    with pytest.raises(CheckpointError, match=r"elsewhere/x: no such model folder$"):
        read_config(tmp_path / "elsewhere" / "x")
    with pytest.raises(CheckpointError, match=r"found a file, expected a model folder"):
        read_config(folder_with(tmp_path, config="{}") / "config.json")
