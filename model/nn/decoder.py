"""The decoder: embedding, layers, final norm, head. One network for every family; how it attends is an argument."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.nn.attention import Attention
from model.nn.mlp import Mlp
from model.nn.norm import make_norm
from model.nn.ops import Angles, Ops
from model.nn.positions import Rotary, SinusoidalPositions


class Layer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)).

    The last addition is left to whoever comes next, so that it can be done together with the norm that follows it.
    """

    def __init__(self, config: ModelConfig, index: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.hidden_size)
        self.attn = Attention(config, index)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor | None, angles: Angles | None, ops: Ops) -> tuple[Tensor, Tensor]:
        """The residual stream x and what is still to be added to it, before this layer -> after it."""
        x, h = ops.add_norm(x, update, self.attn_norm)
        x, h = ops.add_norm(x, self.dropout(self.attn(h, angles, ops)), self.mlp_norm)
        return x, self.dropout(self.mlp(h, ops))


class Decoder(nn.Module):
    """Token ids -> hidden rows -> logits. Rows are tokens of any number of sequences; `ops` keeps them apart."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions: nn.Module | None = None
        self.rotary: Rotary | None = None
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_position, config.hidden_size)
        elif config.position == "sinusoidal":
            self.positions = SinusoidalPositions(config.max_position, config.hidden_size)
        else:
            self.rotary = Rotary(config.rope, config.head_dim, config.max_position)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(config, i, dropout) for i in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, ops: Ops) -> Tensor:
        """Final hidden rows [n, hidden] for token_ids, positions [n]."""
        x: Tensor = self.embed(token_ids)
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        x = self.dropout(x)
        angles = self.rotary(positions, x.dtype) if self.rotary is not None else None
        update: Tensor | None = None
        for layer in self.layers:
            x, update = layer(x, update, angles, ops)
        return ops.add_norm(x, update, self.norm)[1]

    def logits(self, hidden: Tensor, ops: Ops) -> Tensor:
        """Scores [m, vocab] for hidden rows [m, hidden]."""
        return ops.linear(hidden, self.embed.weight if self.head is None else self.head.weight)


def num_parameters(decoder: nn.Module) -> int:
    """Trained numbers in a network, tied ones counted once."""
    return sum(p.numel() for p in decoder.parameters())


def product_shapes(decoder: nn.Module) -> set[tuple[int, int]]:
    """Shapes (out, in) of the weights that rows are multiplied by, but for quantised ones."""
    weights = [layer.weight for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    if isinstance(decoder, Decoder) and decoder.head is None and isinstance(decoder.embed, nn.Embedding):
        weights.append(decoder.embed.weight)
    return {(weight.shape[0], weight.shape[1]) for weight in weights}


def num_bytes(decoder: nn.Module) -> int:
    """What a network's weights and tables take in memory."""
    return sum(t.nbytes for t in (*decoder.parameters(), *decoder.buffers()))


def as_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` -> torch's own."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
