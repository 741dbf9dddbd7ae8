"""A Llama folder of Hugging Face's into one GGUF file: python to_gguf.py FOLDER FILE BF16|Q8_0

Runs in the peers' environment (gguf, torch, safetensors). Norms stay in float32, as llama.cpp's own files have them.
The tokenizer is of the byte-level kind that `checkpoints.py` writes.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    source, target, precision = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    write_shape(writer, config, precision)
    write_tokenizer(writer, json.loads((source / "tokenizer.json").read_text()))
    kind = gguf.GGMLQuantizationType[precision]
    for name, weight in load_file(source / "model.safetensors").items():
        numbers = in_their_order(name, weight.float(), config).numpy()
        if numbers.ndim == 1:
            writer.add_tensor(their_name(name), numbers)
        else:
            writer.add_tensor(their_name(name), gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shape(writer: gguf.GGUFWriter, config: dict, precision: str) -> None:
    writer.add_name("random")
    writer.add_file_type({"BF16": gguf.LlamaFileType.MOSTLY_BF16, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[precision])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = sorted(vocabulary, key=vocabulary.get)
    types = [gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL for piece in pieces]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def in_their_order(name: str, weight: torch.Tensor, config: dict) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers, Hugging Face the two halves of a head: its rows change places."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.view(config[heads], 2, -1, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def their_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, index, part = name.split(".", 3)
        return f"blk.{index}.{NAMES[part]}.weight"
    return f"{NAMES[name]}.weight"


main()
