"""transformers on the same GPU, with the same shapes and load: its `generate` and its continuous batching."""

import time
from collections.abc import Sequence

import torch
import transformers

from model.config import ModelConfig

Load = Sequence[tuple[Sequence[int], int]]  # prompt ids and number of new tokens


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> "transformers.PreTrainedModel":
    """A random network of the same shape."""
    name = {"llama": "Llama", "qwen3": "Qwen3"}[config.family]
    theirs = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        tie_word_embeddings=config.tied_head,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network = getattr(transformers, f"{name}ForCausalLM")(theirs).eval()
    finally:
        torch.set_default_dtype(before)
    return network


@torch.inference_mode()
def generate(network: "transformers.PreTrainedModel", num_streams: int, context: int, num_new: int) -> float:
    """Seconds for a decoding step of `generate`: the time of many new tokens less that of one, per token."""
    ids = torch.randint(network.config.vocab_size, (num_streams, context), device=network.device)

    def run(num: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        network.generate(ids, max_new_tokens=num, min_new_tokens=num, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(2)
    return (run(num_new + 1) - run(1)) / num_new


def continuous(network: "transformers.PreTrainedModel", load: Load) -> float:
    """Output tokens/s of the whole load given at once. Raises RuntimeError if it does not come to an end."""
    settings = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(num for _, num in load)
    )
    with network.continuous_batching_context_manager(generation_config=settings) as manager:
        manager.add_request(list(load[0][0]), max_new_tokens=8)  # whatever it compiles or records
        while not manager.get_result(timeout=60).is_finished():
            pass
        start, total, left = time.perf_counter(), 0, len(load)
        for prompt, num in load:
            manager.add_request(list(prompt), max_new_tokens=num)
        while left:
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError(f"no result for 60 s, {left} of {len(load)} requests left")
            if result.is_finished():
                total, left = total + len(result.generated_tokens), left - 1
        return total / (time.perf_counter() - start)
