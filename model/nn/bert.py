"""The bidirectional encoder (BERT, arXiv 1810.04805): every row of a text sees the whole text.

Its parts are the decoder's; what differs is the norm after each half of a layer, the embedding's norm, and segments. It
knows no cache: a text is computed in one pass, or not at all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.nn.attention import Attention
from model.nn.mlp import Mlp
from model.nn.norm import make_norm
from model.nn.ops import Heads, Ops


class EncoderLayer(nn.Module):
    """Post-norm residual layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: ModelConfig, index: int, dropout: float) -> None:
        super().__init__()
        self.attn = Attention(config, index)
        self.attn_norm = make_norm(config, config.hidden_size)
        self.mlp = Mlp(config)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """Rows [n, hidden] before this layer -> after it."""
        x = ops.add_norm(x, self.dropout(self.attn(x, None, ops)), self.attn_norm)[1]
        return ops.add_norm(x, self.dropout(self.mlp(x, ops)), self.mlp_norm)[1]


class Encoder(nn.Module):
    """Token ids -> hidden rows -> scores of labels, where there are any. Rows are tokens of any number of texts; `ops`
    keeps them apart. Each text is all of the first segment."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position, config.hidden_size)
        self.segments = nn.Embedding(config.num_segments, config.hidden_size)
        self.embed_norm = make_norm(config, config.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, i, dropout) for i in range(config.num_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.labels else None
        self.classifier = nn.Linear(config.hidden_size, len(config.labels)) if config.labels else None

    def forward(self, token_ids: Tensor, positions: Tensor, ops: Ops) -> Tensor:
        """Final hidden rows [n, hidden] for token_ids, positions [n]."""
        x: Tensor = self.embed(token_ids) + self.segments.weight[0] + self.positions(positions)
        x = self.dropout(self.embed_norm(x))
        for layer in self.layers:
            x = layer(x, ops)
        return x

    def scores(self, first: Tensor, ops: Ops) -> Tensor:
        """Scores [m, labels] of texts with these first hidden rows [m, hidden]: the softmax of a row is their
        probabilities. Only where there are labels."""
        assert self.pooler is not None and self.classifier is not None, "a network without labels"
        pooled = torch.tanh(ops.linear(first, self.pooler.weight, self.pooler.bias))
        return ops.linear(self.dropout(pooled), self.classifier.weight, self.classifier.bias)


class SpanAttention(Ops):
    """Attention in both directions inside texts of `lengths` rows, one after another; rows beyond them are padding.

    Each text is attended by itself, without padding, so no text's numbers depend on its neighbours.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)

    def attend(self, layer: int, heads: Heads) -> Tensor:
        q, k, v = heads.finish()
        parts, at = list[Tensor](), 0
        for length in self.lengths:
            # Copies, so that where a text lies in the batch can't show in how its numbers are added up.
            query, key, value = (x[at : at + length].transpose(0, 1).contiguous() for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1))
            at += length
        return torch.cat([*parts, torch.zeros_like(q[at:])])


def text_positions(lengths: Sequence[int]) -> Tensor:
    """Positions int64 [sum of lengths] of texts one after another."""
    return torch.cat([torch.arange(length) for length in lengths])
