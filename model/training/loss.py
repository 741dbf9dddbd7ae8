"""The training loss: cross-entropy of the next token, in chunks of rows so that logits never fill the memory."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nn.attention import DenseAttention
from model.nn.decoder import Decoder

CHUNK = 1024
"""Rows whose logits exist at the same time."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy, see `cross_entropy`. Gradients are made in the forward pass, chunk by chunk, while the logits
    are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        wanted, num = ctx.needs_input_grad[0], len(targets)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), device=hidden.device)
        for first in range(0, num, CHUNK):
            h, at = hidden[first : first + CHUNK], targets[first : first + CHUNK, None]
            chances = F.linear(h, weight).float().log_softmax(-1)
            total -= (1 - smoothing) * chances.gather(1, at).sum()
            if smoothing:
                total -= smoothing * chances.mean(1).sum()
            if wanted:
                slope = chances.exp_().scatter_add_(1, at, chances.new_full(at.shape, smoothing - 1.0)).to(h.dtype)
                grad_hidden[first : first + CHUNK] = slope @ weight
                grad_weight += slope.T @ h
        # What is spread evenly over the vocabulary, and the mean, are left to the end: they would cost a pass over all
        # logits each.
        spread = smoothing / len(weight)
        grad_hidden -= spread * weight.sum(0)
        grad_weight -= spread * hidden.sum(0)
        grad_hidden /= num
        grad_weight /= num
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / num

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean nats per row of `targets` [n] under logits hidden [n, size] @ weight [vocab, size].T, a float32 scalar.

    `smoothing` is the part of each target's weight that is spread over the whole vocabulary (label smoothing,
    arXiv 1512.00567, 7)."""
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, smoothing)  # type: ignore[no-untyped-call]
    return loss


def next_token_loss(
    decoder: Decoder,
    inputs: Tensor,
    targets: Tensor,
    dropout: float = 0.0,
    body: nn.Module | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Mean nats per token of `targets` [b, t] after `inputs` [b, t]; `dropout` is attention's. `body` computes the
    hidden rows in the decoder's stead: its compiled twin."""
    b, t = inputs.shape
    positions = torch.arange(t, device=inputs.device).repeat(b)
    network = decoder if body is None else body
    hidden = network(inputs.reshape(-1), positions, DenseAttention(decoder.config, b, t, dropout))
    weight = decoder.embed.weight if decoder.head is None else decoder.head.weight
    return cross_entropy(hidden, weight, targets.reshape(-1), smoothing)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """All nats spent on a text -> bits for each of its bytes, which compares models with different tokenizers."""
    return nats / math.log(2) / num_bytes
