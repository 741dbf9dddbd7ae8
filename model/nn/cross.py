"""Attention from a decoder's rows to what an encoder made of their sequence's source (arXiv 1706.03762, 3.2.3).

The keys and values of a source are the same for every row that reads it: they are made once, by `keys_values`, and kept
by whoever attends. It knows no cache.
"""

from torch import Tensor, nn

from model.config import ModelConfig
from model.nn.ops import Ops

KeysValues = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """The projections of one layer; `kv` holds the keys' rows before the values'."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.kv_heads, self.head_dim = layer, config.num_kv_heads, config.head_dim
        inner = config.num_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, inner, bias=config.qkv_bias)
        self.kv = nn.Linear(config.hidden_size, 2 * config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(inner, config.hidden_size, bias=config.out_bias)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        n = x.shape[0]
        q = ops.linear(x, self.q.weight, self.q.bias).view(n, -1, self.head_dim)
        return ops.linear(ops.cross(self.layer, q).reshape(n, -1), self.out.weight, self.out.bias)

    def keys_values(self, memory: Tensor, ops: Ops) -> KeysValues:
        """Keys and values [n, kv_heads, d] of an encoder's rows [n, hidden]."""
        kv = ops.linear(memory, self.kv.weight, self.kv.bias).view(len(memory), 2, self.kv_heads, self.head_dim)
        return kv[:, 0], kv[:, 1]
