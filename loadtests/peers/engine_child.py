"""Our bare engine as a child of the benchmark: python -m loadtests.peers.engine_child FOLDER bf16|int8 THREADS

Answers the lines that `contenders.Child` writes. No broker, no HTTP, no text.
"""

import json
import sys
import time
from inspect import signature
from typing import Any

import torch

from loadtests.peers.contenders import MARK, Prompts
from model.engine.engine import Engine
from model.request import Request, SamplingParams

MAX_LEN = 512


def main() -> None:
    """Load, say so, and answer until the input ends."""
    folder, dtype, num_threads = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": MAX_LEN}
    if dtype == "int8":
        if "quantize" not in signature(Engine.load).parameters:
            sys.exit("Engine.load has no `quantize`")
        settings["quantize"] = "int8"
    engine = Engine.load(folder, **settings)
    print(MARK + "{}", flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        print(MARK + json.dumps(run(engine, number, asked["prompts"], asked["num_new"])), flush=True)


def run(engine: Engine, number: int, prompts: Prompts, num_new: int) -> dict[str, object]:
    """All prompts at once, to their end."""
    ids: dict[str, list[int]] = {f"{number}.{index}": [] for index in range(len(prompts))}
    sampling = SamplingParams(temperature=0.0, max_tokens=num_new)
    first_s, num_early = None, 0
    began_s = time.perf_counter()
    for id, prompt in zip(ids, prompts, strict=True):
        engine.add(Request(id, tuple(prompt), sampling))
    while engine.has_work():
        for delta in engine.step():
            ids[delta.id] += delta.token_ids
        if first_s is None and all(ids.values()):
            first_s, num_early = time.perf_counter() - began_s, sum(map(len, ids.values()))
    return {
        "seconds": time.perf_counter() - began_s,
        "first_s": first_s,
        "num_later": sum(map(len, ids.values())) - num_early,
        "token_ids": list(ids.values()),
    }


if __name__ == "__main__":
    main()
