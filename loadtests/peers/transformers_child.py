"""transformers' `generate` as a child of the benchmark: python -m loadtests.peers.transformers_child FOLDER THREADS

Answers the lines that `contenders.Child` writes; `attention` in a line names the implementation, sdpa or eager. All
prompts are one batch of one length, in bfloat16, with the library's growing cache.
"""

import json
import sys
import time

import torch
import transformers

from loadtests.peers.contenders import MARK, Prompts


def main() -> None:
    """Load, say so, and answer until the input ends."""
    folder, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    network.generation_config.eos_token_id = None
    print(MARK + "{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        network.set_attn_implementation(asked["attention"])
        print(MARK + json.dumps(run(network, asked["prompts"], asked["num_new"])), flush=True)


@torch.inference_mode()
def run(network: "transformers.PreTrainedModel", prompts: Prompts, num_new: int) -> dict[str, object]:
    """One batch, to its end."""
    batch = torch.tensor([list(prompt) for prompt in prompts])
    mask = torch.ones_like(batch)
    began_s = time.perf_counter()
    out = network.generate(batch, attention_mask=mask, max_new_tokens=num_new, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - began_s
    return {"seconds": seconds, "token_ids": out[:, batch.shape[1] :].tolist()}


if __name__ == "__main__":
    main()
