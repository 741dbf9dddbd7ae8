"""The decoder: embedding, layers, final norm, head, and the encoder of those families that have one. One network for
every family; how it attends is an argument."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kinds import Full, Linear
from model.nn.cross import KeysValues
from model.nn.encoder import Encoder
from model.nn.favor import Features
from model.nn.layer import Layer, make_last_norm, make_layers, run_layers
from model.nn.ops import Ops, Places
from model.nn.positions import LongRotary, Rotary, SinusoidalPositions
from model.nn.relative import RelativeBias


class Decoder(nn.Module):
    """Token ids -> hidden rows -> logits. Rows are tokens of any number of sequences; `ops` keeps them apart.

    With an encoder, `encode` comes first, once for each source; what `memory` makes of it is for the `ops` of the
    decoder's own passes.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions: nn.Module | None = None
        self.rotary: Rotary | LongRotary | None = None
        self.relative: RelativeBias | None = None
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_position, config.hidden_size)
        elif config.position == "sinusoidal":
            self.positions = SinusoidalPositions(config.max_position, config.hidden_size)
        elif config.position == "relative":
            self.relative = RelativeBias(config.relative_buckets, config.relative_distance, config.num_heads, False)
        elif any(isinstance(config.kind(i), Full | Linear) for i in range(config.num_layers)):
            endless = config.longest > config.max_position
            make = LongRotary if endless else Rotary
            self.rotary = make(config.rope, config.head_dim, config.longest)
        self.dropout = nn.Dropout(dropout)
        self.layers = make_layers(config, config.num_layers, dropout, reads=config.encoder_layers > 0)
        self.norm = make_last_norm(config)
        self.encoder = Encoder(config, dropout) if config.encoder_layers else None
        self.head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, token_ids: Tensor, positions: Tensor, ops: Ops) -> Tensor:
        """Final hidden rows [n, hidden] for token_ids, positions [n]."""
        x = self._embedded(token_ids, positions)
        places: Places = self.rotary(positions, x.dtype) if self.rotary is not None else None
        if self.relative is not None:
            places = self.relative.table()
        return run_layers(self.layers, self.norm, x, places, ops)

    def encode(self, token_ids: Tensor, positions: Tensor, ops: Ops) -> Tensor:
        """The encoder's rows [n, hidden] for token_ids, positions [n] of sources."""
        assert self.encoder is not None, "this network has no encoder"
        rows: Tensor = self.encoder(self._embedded(token_ids, positions), ops)
        return rows

    def memory(self, rows: Tensor, ops: Ops) -> list[KeysValues]:
        """Each layer's keys and values [n, kv_heads, d] of an encoder's rows [n, hidden]."""
        layers = (layer for layer in self.layers if isinstance(layer, Layer))
        return [layer.cross.keys_values(rows, ops) for layer in layers if layer.cross is not None]

    def _embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embed(token_ids)
        if self.config.scaled_embedding:
            x = x * self.config.hidden_size**0.5
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        dropped: Tensor = self.dropout(x)
        return dropped

    def logits(self, hidden: Tensor, ops: Ops) -> Tensor:
        """Scores [m, vocab] for hidden rows [m, hidden]."""
        if self.config.scaled_head:
            hidden = hidden * self.config.hidden_size**-0.5
        return ops.linear(hidden, self.embed.weight if self.head is None else self.head.weight)


def num_parameters(decoder: nn.Module) -> int:
    """Trained numbers in a network, tied ones counted once."""
    return sum(p.numel() for p in decoder.parameters())


def product_shapes(decoder: nn.Module) -> set[tuple[int, int]]:
    """Shapes (out, in) of the weights that rows are multiplied by, but for quantised ones."""
    weights = [layer.weight for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    weights += [layer.get_buffer("weight") for layer in decoder.modules() if isinstance(layer, Features)]
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
