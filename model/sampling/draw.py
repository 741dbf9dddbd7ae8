"""Scores to ids: temperature, truncation and the draw itself. It knows parameters and numbers, no sequences.

Probabilities are turned into whole numbers first (2**46 is certainty). Their sums in float64 are exact in any order, so
a result does not hang on threads, devices or on how many candidates were looked at; below 2**-46 nothing is drawn.

The order is that of Hugging Face transformers' logits warpers: temperature, then top-k, then top-p (the nucleus, arXiv
1904.09751), then min-p (arXiv 2407.01082), each on what the one before left. Equal scores rank by id, lower first.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.request import SamplingParams

_CERTAINTY = 2.0**46
_MIN_TEMPERATURE = 1e-30  # below it float32 would divide by zero; the outcome is the same
_WIDTH = 64  # candidates that a truncated row is sorted for at first; where they are not enough, all are
_BLOCK = 128  # weights of which a draw needs no more than the sum, unless it falls among them


def draw(scores: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Ids int64 [m] drawn from scores float32 [m, vocab], whose row maxima are finite, by uniforms in [0, 1).

    Every row has a temperature above 0. A row without top-k and top-p is never sorted.
    """
    weights = whole_weights(scores, column(scores, [p.temperature for p in params]))
    truncated = [p.top_k > 0 or p.top_p < 1 for p in params]
    drawn = torch.empty(len(params), dtype=torch.int64, device=scores.device)
    for ranked in (False, True):
        at = [i for i, t in enumerate(truncated) if t is ranked]
        if at:
            of, us = [params[i] for i in at], [uniforms[i] for i in at]
            w, s = take(weights, at), take(scores, at)
            drawn[at] = _draw_ranked(s, w, of, us, _WIDTH) if ranked else _choose(w, of, us)
    return drawn


def leaders(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` highest scores of each row [m, vocab] and their ids, by falling score, then rising id.

    Which of several equal scores come in last is left open, unless `width` covers the vocabulary.
    """
    if width >= scores.shape[-1]:
        if scores.device.type == "cpu" and scores.dtype == torch.float32:
            return _all_ranked(scores)
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = scores.topk(width).indices.sort(-1).values
    values, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _all_ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the whole vocabulary, by sorting numbers of a score's bits and an id. NumPy has vector instructions
    for that, which torch's sort has not: it is ten times as fast."""
    bits = (scores + 0.0).view(torch.int32)  # -0 is 0 now
    falling = ~(bits ^ (bits >> 31 & 0x7FFFFFFF))  # the bits of a negative float count downwards
    keys = falling.long() << 32 | torch.arange(scores.shape[-1])
    ids = torch.from_numpy(np.sort(keys.numpy(), axis=-1)) & 0xFFFFFFFF
    return scores.gather(-1, ids), ids


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of x, ascending; x itself if that is all of them."""
    return x if len(rows) == x.shape[0] else x[list(rows)]


def column(like: Tensor, values: Sequence[float]) -> Tensor:
    """Values as float64 [m, 1] where `like` is."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def choose(weights: Tensor, min_p: Tensor | None, uniforms: Tensor) -> Tensor:
    """Indices [m] into weights [m, n], after min-p, by inverting the cumulative sum; the others are float64 [m, 1].

    Two sums instead of a long one: of blocks, then within the block that is hit. u * total < total in float64 for every
    u <= 1 - 2**-53 and total < 2**53, and the first sum above the target belongs to a weight above 0: an id of no
    weight is never drawn.
    """
    if min_p is not None:
        weights = torch.where(weights < (min_p * weights.amax(-1, keepdim=True)).ceil(), 0, weights)
    n, num_blocks = weights.shape[-1], weights.shape[-1] // _BLOCK
    blocks = weights[:, : num_blocks * _BLOCK].reshape(len(weights), num_blocks, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    rest = weights[:, num_blocks * _BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)
    mass = torch.cat([torch.zeros_like(rest), sums, rest], dim=-1).cumsum(-1)  # before each block, and the total
    targets = (uniforms * mass[:, -1:]).floor()
    block = torch.searchsorted(mass[:, 1:].contiguous(), targets, right=True)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, ids.clamp(max=n - 1)).masked_fill(ids >= n, 0).cumsum(-1, dtype=torch.float64)
    within = torch.searchsorted(inside, targets - mass.gather(-1, block), right=True)
    return (block * _BLOCK + within)[:, 0]


def whole_weights(scores: Tensor, temperatures: Tensor) -> Tensor:
    """Probabilities of scores float32 [m, vocab] at temperatures [m, 1] as whole numbers, float32."""
    temperatures = temperatures.clamp(min=_MIN_TEMPERATURE).float()
    # The highest score becomes 0 before the division, which therefore cannot overflow upwards.
    probabilities = (scores - scores.amax(-1, keepdim=True)).div_(temperatures).softmax(-1)
    return probabilities.mul_(_CERTAINTY).floor_()


def _choose(weights: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    min_p = column(weights, [p.min_p for p in params]) if any(p.min_p for p in params) else None
    return choose(weights, min_p, column(weights, uniforms))


def _draw_ranked(
    scores: Tensor, weights: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float], width: int
) -> Tensor:
    """Ids [m] for rows with top-k or top-p, both of which keep a prefix of the ranking.

    Only the first `width` candidates are sorted. A row is settled if its prefix ends among them, ahead of the last
    one's equals; the rest try again with all. Weights are whole numbers, so the width cannot show in the result.
    """
    vocab = weights.shape[-1]
    values, ids = leaders(scores, width)
    width = ids.shape[-1]
    ranked = weights.gather(-1, ids)
    mass = ranked.cumsum(-1, dtype=torch.float64)
    limits = column(mass, [min(p.top_k or vocab, vocab) for p in params]).long()
    totals = torch.where(
        limits < vocab, mass.gather(-1, limits.clamp(max=width) - 1), weights.sum(-1, keepdim=True, dtype=torch.float64)
    )  # what top-k leaves; wrong only where it reaches beyond the width, and such a row is not settled
    needed = column(mass, [p.top_p for p in params]) * totals
    kept = torch.minimum((mass < needed).sum(-1, keepdim=True) + 1, limits)
    ranks = torch.arange(width, device=ids.device)
    chosen = _choose(ranked.masked_fill(ranks >= kept, 0), params, uniforms)
    drawn = ids.gather(-1, chosen[:, None])[:, 0]
    if width == vocab:
        return drawn
    ends_inside = (kept < width) & ((limits <= width) | (limits == vocab))
    settled = ends_inside & (values.gather(-1, kept.clamp(max=width) - 1) > values[:, -1:])
    rest = [i for i, done in enumerate(settled[:, 0].tolist()) if not done]
    if rest:
        of, us = [params[i] for i in rest], [uniforms[i] for i in rest]
        drawn[rest] = _draw_ranked(take(scores, rest), take(weights, rest), of, us, vocab)
    return drawn
