"""Scores to ids: temperature, truncation and the draw itself. It knows parameters and numbers, no sequences.

Probabilities are turned into whole numbers first (2**46 is certainty). Their sums are exact in any order, so a result
does not hang on threads, devices or on how many candidates were looked at; what is below 2**-46 cannot be drawn.

The order is that of Hugging Face transformers' logits warpers: temperature, then top-k, then top-p (the nucleus, arXiv
1904.09751), then min-p (arXiv 2407.01082), each on what the one before left. Equal scores rank by id, lower first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.request import SamplingParams

_CERTAINTY = 2.0**46
_MIN_TEMPERATURE = 1e-30  # below it float32 would divide by zero; the outcome is the same
_WIDTH = 64  # candidates that a truncated row is sorted for at first
_WIDEN = 16


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
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = scores.topk(width).indices.sort(-1).values
    values, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of x, ascending; x itself if that is all of them."""
    return x if len(rows) == x.shape[0] else x[list(rows)]


def column(like: Tensor, values: Sequence[float]) -> Tensor:
    """Values as float64 [m, 1] where `like` is."""
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def choose(weights: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """Indices [m] into weights [m, n], after min-p, by inverting the cumulative sum; the others are float64 [m, 1].

    u * total < total in float64 for every u <= 1 - 2**-53 and total < 2**53, and the first sum above the target
    belongs to a weight above 0: an id of no weight is never drawn.
    """
    floors = min_p * weights.amax(-1, keepdim=True)
    weights = torch.where(weights < floors.ceil().long(), 0, weights)
    mass = weights.cumsum(-1)
    targets = (uniforms * mass[:, -1:]).long()
    return torch.searchsorted(mass, targets, right=True)[:, 0]


def whole_weights(scores: Tensor, temperatures: Tensor) -> Tensor:
    """Probabilities of scores float32 [m, vocab] at temperatures [m, 1] as whole numbers, int64."""
    temperatures = temperatures.clamp(min=_MIN_TEMPERATURE).float()
    # The highest score becomes 0 before the division, which therefore cannot overflow upwards.
    probabilities = ((scores - scores.amax(-1, keepdim=True)) / temperatures).softmax(-1)
    return (probabilities * _CERTAINTY).long()


def _choose(weights: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    return choose(weights, column(weights, [p.min_p for p in params]), column(weights, uniforms))


def _draw_ranked(
    scores: Tensor, weights: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float], width: int
) -> Tensor:
    """Ids [m] for rows with top-k or top-p, both of which keep a prefix of the ranking.

    Only the first `width` candidates are sorted. A row is settled if its prefix ends among them, ahead of the last
    one's equals; the rest try again with more. Weights are whole numbers, so the width cannot show in the result.
    """
    vocab = weights.shape[-1]
    values, ids = leaders(scores, width)
    width = ids.shape[-1]
    ranked = weights.gather(-1, ids)
    mass = ranked.cumsum(-1)
    limits = column(mass, [min(p.top_k or vocab, vocab) for p in params]).long()
    totals = torch.where(
        limits < vocab, mass.gather(-1, limits.clamp(max=width) - 1), weights.sum(-1, keepdim=True)
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
        drawn[rest] = _draw_ranked(take(scores, rest), take(weights, rest), of, us, width * _WIDEN)
    return drawn
