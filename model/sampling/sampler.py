"""Logits to ids for a mixed batch: the edits to the scores, the greedy choice, log-probabilities. `draw` draws.

The order is: ids that a grammar forbids, repetition penalty, then presence and frequency penalties and `logit_bias`
(added up), then the stop ids that `min_tokens` still forbids, and then what `draw` does. Nothing brings back what a
grammar has forbidden. Log-probabilities are taken before all of it.

A row's result depends on no other row: every operation is either exact whatever its place (one rounding for each
element) or a kernel that handles a row by itself. It must know no cache, network or scheduler.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.request import SamplingParams, TokenLogprob
from model.sampling.draw import draw, leaders, take
from model.sampling.random import uniform
from model.sampling.seen import Seen

_MASK_OF_BYTE = torch.tensor([[0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)])
Edit = tuple[NDArray[np.int64], NDArray[np.float64]]  # of a row: ids, and a number for each
_MIN_LEADERS = 64  # more than any request may ask for, so that equal logits rank the same whoever else is asking


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one sequence at this step. The id drawn for it has output position `len(output_ids)`.

    `allowed` has a bit for each id, the lowest first; None allows them all. `seen` is kept from step to step, so that a
    penalty costs as much in a long text as in a short one; without it all ids are looked at again.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    allowed: bytes | None = None
    seen: Seen | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """One entry for each row, in order.

    `logprobs` is None where none were asked for. `bad` marks rows without a usable distribution (a NaN or +inf among
    the logits, or all of them -inf): their id is 0 and means nothing, and the sequence must end with an error.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    bad: list[bool]


def sample(logits: Tensor, rows: Sequence[Row]) -> Drawn:
    """Draw one id for each of `rows` from logits [m, vocab] (any float dtype and device), which stay unchanged.

    Temperature 0 takes the highest score, the lowest id among equals. All other ids are a function of the row's
    scores, its seed and its position alone.
    """
    raw = logits.float()
    scores = edit(raw, rows)
    bad: list[bool] = (~scores.amax(-1).isfinite()).tolist()
    token_ids = [0] * len(rows)
    greedy = [i for i, row in enumerate(rows) if not bad[i] and row.params.temperature == 0]
    if greedy:
        _put(token_ids, greedy, take(scores, greedy).argmax(-1))
    hot = [i for i, row in enumerate(rows) if not bad[i] and row.params.temperature > 0]
    if hot:
        uniforms = [uniform(rows[i].params.seed, len(rows[i].output_ids)) for i in hot]
        _put(token_ids, hot, draw(take(scores, hot), [rows[i].params for i in hot], uniforms))
    return Drawn(token_ids, _logprobs(raw, rows, token_ids, bad), bad)


def edit(raw: Tensor, rows: Sequence[Row]) -> Tensor:
    """Scores [m, vocab] after grammars, penalties, biases and forbidden stop ids; `raw` itself if no row has any.

    Repetition (prompt and output): a score above 0 is divided by the penalty, another multiplied (arXiv 1909.05858
    section 4.1, with Hugging Face's treatment of negative scores). Presence and frequency (output only): minus
    `presence` once and `frequency` for every occurrence, as OpenAI's API reference defines them.
    """
    repetition = _cells(raw, [_repetition(row) for row in rows])
    shifts = _cells(raw, [_shifts(row) for row in rows])
    forbidden = _cells(raw, [_forbidden(row) for row in rows])
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    if repetition is None and shifts is None and forbidden is None and not masked:
        return raw
    scores = raw.clone()
    if masked:
        scores[masked] += _masks([rows[i].allowed or b"" for i in masked], like=raw)  # added, so that a NaN stays one
    if repetition is not None:
        at, penalties = repetition
        old = scores[at]
        scores[at] = torch.where(old > 0, old / penalties, old * penalties)
    if shifts is not None:
        at, amounts = shifts
        scores[at] += amounts
    if forbidden is not None:
        at, minus_infinity = forbidden
        old = scores[at]
        scores[at] = old + minus_infinity  # added, so that a NaN stays one
        nothing_left = scores.amax(-1) == -torch.inf
        scores[at] = torch.where(nothing_left[at[0]], old, scores[at])  # a row with nothing else keeps its stop ids
    return scores


def _masks(allowed: Sequence[bytes], like: Tensor) -> Tensor:
    """For m rows of bits, 0 where one is set and -inf elsewhere: [m, vocab], the vocabulary of `like`."""
    packed = torch.frombuffer(bytearray(b"".join(allowed)), dtype=torch.uint8).view(len(allowed), -1)
    return _MASK_OF_BYTE.to(like.device)[packed.to(like.device).int()].flatten(1)[:, : like.shape[-1]]


def _seen(row: Row) -> Seen:
    return (row.seen or Seen(row.prompt_ids)).update(row.output_ids)


def _repetition(row: Row) -> Edit | None:
    penalty = row.params.repetition_penalty
    if penalty == 1:
        return None
    ids = np.array(_seen(row).ids, dtype=np.int64)
    return ids, np.full(len(ids), penalty)


def _shifts(row: Row) -> Edit | None:
    p, shifts = row.params, dict(row.params.logit_bias)
    if p.presence_penalty or p.frequency_penalty:
        for token_id, count in _seen(row).counts.items():
            shifts[token_id] = shifts.get(token_id, 0.0) - p.presence_penalty - p.frequency_penalty * count
    return _edit(shifts.keys(), shifts.values()) if shifts else None


def _forbidden(row: Row) -> Edit | None:
    ids = row.params.stop_token_ids
    return _edit(ids, [-np.inf] * len(ids)) if ids and len(row.output_ids) < row.params.min_tokens else None


def _edit(ids: Collection[int], numbers: Collection[float]) -> Edit:
    return np.fromiter(ids, np.int64, len(ids)), np.fromiter(numbers, np.float64, len(numbers))


def _cells(like: Tensor, edits: Sequence[Edit | None]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Each row's edit as index pair (rows, ids) and values; None if there are no values."""
    known = [(row, edit) for row, edit in enumerate(edits) if edit is not None and len(edit[0])]
    if not known:
        return None
    rows = np.repeat([row for row, _ in known], [len(edit[0]) for _, edit in known])
    ids, values = (torch.from_numpy(np.concatenate([edit[i] for _, edit in known])) for i in (0, 1))
    return (torch.from_numpy(rows).to(like.device), ids.to(like.device)), values.to(like.device, like.dtype)


def _logprobs(
    raw: Tensor, rows: Sequence[Row], token_ids: Sequence[int], bad: Sequence[bool]
) -> list[TokenLogprob | None]:
    """What the network itself thought of the drawn ids, for the rows that ask."""
    found: list[TokenLogprob | None] = [None] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.params.num_logprobs is not None and not bad[i]]
    if not asking:
        return found
    asked = [rows[i].params.num_logprobs or 0 for i in asking]
    logits = take(raw, asking)
    logprobs = logits.log_softmax(-1)
    drawn = logprobs.gather(-1, torch.tensor([[token_ids[i]] for i in asking], device=raw.device))[:, 0].tolist()
    top: list[list[tuple[int, float]]] = [[] for _ in asking]
    if max(asked) > 0:
        _, ids = leaders(logits, max(_MIN_LEADERS, *asked))
        ids = ids[:, : max(asked)]
        pairs = zip(ids.tolist(), logprobs.gather(-1, ids).tolist(), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in pairs]
    for i, num, logprob, likeliest in zip(asking, asked, drawn, top, strict=True):
        found[i] = TokenLogprob(logprob, tuple(likeliest[:num]))
    return found


def _put(target: list[int], rows: Sequence[int], ids: Tensor) -> None:
    for i, token_id in zip(rows, ids.tolist(), strict=True):
        target[i] = token_id
