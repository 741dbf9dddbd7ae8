"""What a stream of a certain length costs in the engine's plain runner: memory, and the time of each next token."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer as Library
from tokenizers import models

from model.cache.states import bytes_per_slot
from model.cache.store import bytes_per_block
from model.config import EngineConfig, ModelConfig
from model.engine.engine import Engine
from model.engine.runner import Runner
from model.nn.decoder import Decoder
from model.request import Request, SamplingParams
from model.tokenizer import Tokenizer

LENGTHS = tuple(1024 * 2**i for i in range(7))
READ_AT_ONCE = 512
NUM_DECODED = 24


@dataclass(frozen=True, slots=True)
class Measured:
    """A stream that has become `num_tokens` long: bytes that it has in the cache and in its slot, and the processor's
    and the clock's median milliseconds of the tokens that follow. Other work on the machine disturbs the first less."""

    num_tokens: int
    num_bytes: int
    cpu_ms: float
    wall_ms: float


def measure(shape: ModelConfig, lengths: Sequence[int]) -> Iterator[Measured]:
    """One stream for each length, its prompt read in chunks; weights are random."""
    longest = max(lengths) + 2 * NUM_DECODED
    shape = replace(shape, max_position=longest)
    torch.manual_seed(0)
    decoder = Decoder(shape).eval().requires_grad_(False)
    tokenizer = Tokenizer(Library(models.BPE(vocab={"a": 0}, merges=[])))
    blocks = -(-longest // 16) + 1
    config = EngineConfig(max_model_len=longest, max_num_seqs=1, max_batch_tokens=READ_AT_ONCE, num_blocks=blocks)
    engine = Engine(decoder, tokenizer, config, Runner(decoder, config))
    for length in lengths:
        ids = torch.randint(shape.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        engine.add(Request(str(length), tuple(ids), SamplingParams(max_tokens=NUM_DECODED, seed=1)))
        told = engine.step()
        while not any(delta.token_ids for delta in told):
            told = engine.step()
        used, cpu_ms, wall_ms = 0, list[float](), list[float]()
        while engine.has_work():
            used = max(used, engine.scheduler.pool.num_used) if cpu_ms else 0  # the prompt's last chunk is given back
            began = time.process_time(), time.perf_counter()
            engine.step()
            cpu_ms.append((time.process_time() - began[0]) * 1e3)
            wall_ms.append((time.perf_counter() - began[1]) * 1e3)
        num_bytes = used * bytes_per_block(shape, 16, torch.float32) + bytes_per_slot(shape)
        yield Measured(length, num_bytes, statistics.median(cpu_ms), statistics.median(wall_ms))
