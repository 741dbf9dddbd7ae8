"""OpenVINO GenAI's continuous batching as a child of the benchmark: python openvino_child.py FOLDER THREADS STREAMS

Runs in the peers' environment and answers the lines that `contenders.Child` writes. It computes in bfloat16, with the
cache in the same dtype; weights are what the folder has. Prefix caching is off, for no prompt comes twice.
"""

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai

CACHE_GIB = 2


def main() -> None:
    folder, num_threads, num_streams = sys.argv[1:]
    scheduling = genai.SchedulerConfig()
    scheduling.cache_size = CACHE_GIB
    scheduling.max_num_seqs = int(num_streams)
    scheduling.enable_prefix_caching = False
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        "INFERENCE_NUM_THREADS": int(num_threads),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", properties)
    print("@@ {}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print("@@ " + json.dumps(run(pipeline, asked["prompts"], asked["num_new"])), flush=True)


def run(pipeline: genai.ContinuousBatchingPipeline, prompts: list, num_new: int) -> dict:
    """All prompts at once, to their end."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = num_new, True, False
    tensors = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    began_s = time.perf_counter()
    results = pipeline.generate(tensors, [config] * len(tensors))
    seconds = time.perf_counter() - began_s
    return {"seconds": seconds, "token_ids": [list(result.m_generation_ids[0]) for result in results]}


main()
