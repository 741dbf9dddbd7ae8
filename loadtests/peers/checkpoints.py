"""Random Llama checkpoints of three sizes, as Hugging Face folders and in the formats of the peers.

    python -m loadtests.peers.checkpoints [S M L]

Speed does not depend on what weights say, so nothing is downloaded. Every file is made once, from a fixed seed, and
kept in `.peers/models`, which git ignores. The programs beside this module convert, in the peers' environment.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
HOME = HERE.parent.parent / ".peers"
TOOLS = HOME / "tools" / "bin" / "python"
MODELS = HOME / "models"
END = "<|endoftext|>"
NUM_SILENT = 257  # the end and the 256 bytes: greedy never draws them, so that every token is a text of its own
MAX_POSITION = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama network; `tied`: the embedding is the head."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def linear_weights(self) -> int:
        """Numbers that a decoding step multiplies with: every layer's matrices and the head."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    def step_bytes(self, bytes_per_weight: int, context: int) -> int:
        """The fewest bytes that a decoding step of one stream reads: each weight once, and the context's keys and
        values at two bytes a number. Scales and norms are left out: they are under a per cent."""
        cache = 2 * self.num_layers * self.num_kv_heads * self.head_dim * context * 2
        return self.linear_weights() * bytes_per_weight + cache


SHAPES = {
    "S": Shape("S", 32_000, 288, 6, 6, 6, 768, tied=True),
    "M": Shape("M", 49_152, 576, 30, 9, 3, 1536, tied=True),
    "L": Shape("L", 32_000, 2048, 22, 32, 4, 5632, tied=False),
}


def folder(shape: Shape) -> Path:
    """The Hugging Face folder in bfloat16, made if it is not there."""
    path = MODELS / shape.name / "hf"
    if not (path / "model.safetensors").is_file():
        print(f"making the {shape.name} checkpoint in {path}", flush=True)
        path.mkdir(parents=True, exist_ok=True)
        _write_config(shape, path)
        _write_tokenizer(shape, path)
        partial = path / "partial"
        save_file(_weights(shape), partial, metadata={"format": "pt"})
        os.replace(partial, path / "model.safetensors")
    return path


def gguf(shape: Shape, dtype: str) -> Path:
    """llama.cpp's file: BF16 for `bf16`, Q8_0 for `int8`. Raises `CalledProcessError`."""
    path = MODELS / shape.name / f"{dtype}.gguf"
    if not path.is_file():
        _convert("to_gguf.py", folder(shape), path, {"bf16": "BF16", "int8": "Q8_0"}[dtype])
    return path


def openvino(shape: Shape, dtype: str) -> Path:
    """OpenVINO's folder, with weights in `bf16` or `int8`. Raises `CalledProcessError`."""
    path = MODELS / shape.name / f"openvino-{dtype}"
    if not path.is_dir():
        _convert("to_openvino.py", folder(shape), path, dtype)
    return path


def _convert(program: str, source: Path, target: Path, precision: str) -> None:
    print(f"converting {source.parent.name} to {target.name}", flush=True)
    partial = target.with_name(f"partial-{target.name}")
    command = [str(TOOLS), str(HERE / "programs" / program), str(source), str(partial), precision]
    subprocess.run(command, check=True, stdout=sys.stderr)
    partial.rename(target)


def _write_config(shape: Shape, path: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
    }
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _write_tokenizer(shape: Shape, path: Path) -> None:
    """Bytes, one pair, and words that no merge ever makes, up to the size of the vocabulary."""
    pieces = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    for index in range(shape.vocab_size - len(pieces)):
        pieces.append("".join(letters[index // 26**place % 26] for place in (3, 2, 1, 0)))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITION,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def _weights(shape: Shape) -> dict[str, torch.Tensor]:
    """Normal numbers of the size that trained networks start with, from one seed."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    size, inner = shape.hidden_size, shape.intermediate_size
    weights = {"model.embed_tokens.weight": matrix(shape.vocab_size, size)}
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}."
        for name, rows, columns in (
            ("self_attn.q_proj", wide, size),
            ("self_attn.k_proj", narrow, size),
            ("self_attn.v_proj", narrow, size),
            ("self_attn.o_proj", size, wide),
            ("mlp.gate_proj", inner, size),
            ("mlp.up_proj", inner, size),
            ("mlp.down_proj", size, inner),
        ):
            weights[f"{layer}{name}.weight"] = matrix(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(size, dtype=torch.bfloat16)
    if not shape.tied:
        weights["lm_head.weight"] = matrix(shape.vocab_size, size)
    weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"][:NUM_SILENT] = 0
    return weights


def main() -> None:
    """Make everything for the sizes that are named, or for all."""
    for name in sys.argv[1:] or SHAPES:
        shape = SHAPES[name]
        for dtype in ("bf16", "int8"):
            gguf(shape, dtype)
            openvino(shape, dtype)


if __name__ == "__main__":
    main()
