"""Small networks of every kind of layer, and their logits by way of the scheduler, the runner and the cache."""

from dataclasses import replace

import torch
from torch import Tensor

from model.config import EngineConfig, ModelConfig
from model.engine.runner import Runner
from model.engine.scheduler import Scheduler
from model.engine.sequence import Sequence
from model.engine.sizing import with_needs
from model.kinds import read_kind
from model.nn.attention import DenseAttention, PagedAttention
from model.nn.decoder import Decoder
from model.request import Request, SamplingParams
from tests.model.conftest import TINY, random_decoder

WORDS = (
    "lstm:24",
    "linear:16",
    "window:40",
    "window:40:5:2",
    "recurrent-memory:32:48",
    "lstm:24,window:40:5:2,linear:16,recurrent-memory:20:0",
    "full,linear:16",
)


def shape(word: str, **changes: object) -> ModelConfig:
    """TINY with layers of these kinds, two of them if there is one."""
    kinds = tuple(map(read_kind, word.split(",")))
    kinds = kinds if len(kinds) > 1 else kinds * 2
    config = replace(TINY, family="millrace-streams", attention=kinds, num_layers=len(kinds), max_position=1024)
    return replace(config, **changes)  # type: ignore[arg-type]


def network(word: str) -> Decoder:
    return random_decoder(shape(word))


def some_ids(num: int) -> list[int]:
    return torch.randint(256, (num,), generator=torch.Generator().manual_seed(3)).tolist()


@torch.no_grad()
def parallel(decoder: Decoder, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab], the whole sequence at once."""
    ops = DenseAttention(decoder.config, 1, len(ids))
    return decoder.logits(decoder(torch.tensor(ids), torch.arange(len(ids)), ops), ops)


@torch.inference_mode()
def stepped(decoder: Decoder, ids: list[int], at_once: int) -> Tensor:
    """The same by steps of the engine."""
    config = EngineConfig(max_model_len=1024, num_blocks=80, max_batch_tokens=at_once, max_num_seqs=min(8, at_once))
    config = with_needs(config, decoder.config)
    runner, scheduler, parts = Runner(decoder, config), Scheduler(config), list[Tensor]()
    scheduler.add(Sequence(Request("a", tuple(ids), SamplingParams(max_tokens=1)), config.max_model_len))
    while scheduler.has_work:
        plan = scheduler.plan()
        batch = runner.build(plan)
        ops = PagedAttention(decoder.config, runner.store, batch, runner.pieces, runner.states)
        hidden = decoder(batch.token_ids, batch.positions, ops)
        parts.append(decoder.logits(hidden, ops)[: plan.num_tokens])
        scheduler.commit(plan, {chunk.sequence.id: 0 for chunk in plan.chunks if chunk.draws})
    return torch.cat(parts)
