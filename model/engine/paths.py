"""Which runner computes: the fast one where there is a GPU, Triton, and kernels that agree with their twins; on a CPU
the native core where it has been built; else the plain one, which runs everywhere."""

import logging
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from model.cache.store import PagedStore
from model.config import EngineConfig
from model.engine.encoding import EncoderRunner
from model.engine.fast import FastRunner
from model.engine.native import NativeRunner
from model.engine.runner import Computed, Runner
from model.engine.scheduler import Fork, StepPlan
from model.native import library as native
from model.native.packing import why_not
from model.nn.bert import Encoder
from model.nn.decoder import Decoder, as_dtype

HAS_KERNELS = torch.cuda.is_available() and find_spec("triton") is not None
if HAS_KERNELS:
    from model.nn.kernels.check import disagreement
    from model.nn.kernels.ops import KernelOps

logger = logging.getLogger(__name__)


Network = Decoder | Encoder


class StepRunner(Protocol):
    """What an engine needs of a runner. `collect` takes what `start` gave, once, in the same order."""

    @property
    def decoder(self) -> Network: ...
    @property
    def store(self) -> PagedStore: ...

    def can_run_ahead(self, plan: StepPlan) -> bool: ...
    def start(self, plan: StepPlan) -> Any: ...
    def collect(self, flight: Any) -> Computed: ...
    def fork(self, fork: Fork) -> None: ...


def make_runner(decoder: Network, config: EngineConfig, drop: bool = False) -> StepRunner:
    """The best runner for this machine, ready to compute. If it has to go the plain way, the log says why.

    `drop`: the runner may take the decoder's matrices away, so that weights it packs are in memory once.
    """
    if isinstance(decoder, Encoder):
        return EncoderRunner(decoder, config)
    if decoder.config.attention:
        shares = "" if decoder.config.cache_needs.is_shareable else "; nothing is shared between common beginnings"
        logger.warning("layers of other kinds than full attention are computed in plain PyTorch%s", shares)
        return Runner(decoder, config)
    if not config.device.startswith("cuda"):
        return (_make_native(decoder, config, drop) if config.native else None) or Runner(decoder, config)
    reason: str | None = "triton is not installed"
    if decoder.config.encoder_layers:
        reason = "they compute decoders without an encoder"
    elif HAS_KERNELS:
        reason = disagreement(decoder.config, torch.device(config.device), as_dtype(config.dtype))
        if reason is None:
            runner = FastRunner(decoder, config, KernelOps)
            runner.warm()
            return runner
    logger.error("the GPU runs without kernels and graphs, many times slower: %s", reason)
    return Runner(decoder, config)


def _make_native(decoder: Decoder, config: EngineConfig, drop: bool) -> NativeRunner | None:
    """The runner with the native core, None if it can't serve here."""
    reason = why_not(decoder.config, as_dtype(config.dtype), config.block_size)
    if reason is None:
        library = native.load()
        if library is not None:
            return NativeRunner(decoder, config, library, drop=drop)
        reason = "it has not been built; `python -m model.native.build` does, with a C++ compiler"
    logger.warning("this CPU runs without the native core, several times slower: %s", reason)
    return None
