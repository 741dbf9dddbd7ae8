"""Drawing without waiting: the ids stay on the device, and the host is told of them later.

It covers what is a function of a row's scores and a few numbers: greedy choice, temperature, top-k, top-p, min-p. A
row with penalties, biases, forbidden stop ids or log-probabilities goes through `sampler`, which gives the same ids for
all others. Every branch here is taken by what the host knows beforehand, never by a number on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.request import SamplingParams
from model.sampling.draw import choose, leaders, whole_weights
from model.sampling.random import uniforms

_MOST_ROWS = 64  # drawn at a time: a row needs about 50 bytes for each id of the vocabulary


def needs_host(params: SamplingParams, num_outputs: int) -> bool:
    """Whether a row at output position `num_outputs` has to be drawn by `sampler`."""
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    forbidden = params.stop_token_ids and num_outputs < params.min_tokens
    return bool(penalised or params.logit_bias or forbidden or params.num_logprobs is not None)


class Draws:
    """How `len(params)` rows are to be drawn; `positions` are their output positions."""

    def __init__(self, params: Sequence[SamplingParams], positions: Sequence[int]) -> None:
        self.num = len(params)
        self.hot = [i for i, p in enumerate(params) if p.temperature > 0 and not _ranked(p)]
        self.ranked = [i for i, p in enumerate(params) if p.temperature > 0 and _ranked(p)]
        order = [*self.hot, *self.ranked]
        of = [params[i] for i in order]
        columns = ([p.temperature for p in of], [p.top_k for p in of], [p.top_p for p in of], [p.min_p for p in of])
        drawn = uniforms([p.seed for p in of], [positions[i] for i in order])
        self.numbers: NDArray[np.float64] = np.array([order, *columns, drawn], dtype=np.float64)


def _ranked(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def draw_rows(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Ids int64 [m] for logits [m, vocab], and which rows are bad: no finite highest score. A bad row's id is 0."""
    peaks, ids = logits.max(-1)
    bad = ~peaks.isfinite()
    if draws.hot or draws.ranked:
        numbers = torch.from_numpy(draws.numbers)
        if logits.is_cuda:
            numbers = numbers.pin_memory().to(logits.device, non_blocking=True)
        for part in _slices(0, len(draws.hot)):
            _draw(logits, ids, numbers[:, part], ranked=False)
        for part in _slices(len(draws.hot), len(draws.hot) + len(draws.ranked)):
            _draw(logits, ids, numbers[:, part], ranked=True)
    return ids.masked_fill(bad, 0), bad


def _slices(start: int, stop: int) -> list[slice]:
    return [slice(at, min(at + _MOST_ROWS, stop)) for at in range(start, stop, _MOST_ROWS)]


def _draw(logits: Tensor, ids: Tensor, numbers: Tensor, ranked: bool) -> None:
    """Replace the ids of some rows; `numbers` float64 [6, rows]: row, temperature, top-k, top-p, min-p, uniform."""
    rows = numbers[0].long()
    temperature, top_k, top_p, min_p, u = (column[:, None] for column in numbers[1:])
    scores = logits[rows].float()
    scores = torch.where(scores.amax(-1, keepdim=True).isfinite(), scores, 0.0)  # bad rows: anything that can be drawn
    weights = whole_weights(scores, temperature)
    if not ranked:
        ids[rows] = choose(weights, min_p, u)
        return
    vocab = scores.shape[-1]
    _, order = leaders(scores, vocab)
    weights = weights.gather(-1, order)
    mass = weights.cumsum(-1, dtype=torch.float64)
    limits = torch.where(top_k > 0, top_k, vocab).long().clamp(max=vocab)
    needed = top_p * mass.gather(-1, limits - 1)
    kept = torch.minimum((mass < needed).sum(-1, keepdim=True) + 1, limits)
    ranks = torch.arange(vocab, device=logits.device)
    ids[rows] = order.gather(-1, choose(weights.masked_fill(ranks >= kept, 0), min_p, u)[:, None])[:, 0]
