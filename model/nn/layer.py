"""One layer: self-attention, attention to a source where there is one, feed-forward, and where the norms stand."""

from torch import Tensor, nn

from model.config import ModelConfig
from model.nn.cross import CrossAttention
from model.nn.mixers import make_mixer
from model.nn.mlp import Mlp
from model.nn.norm import make_norm
from model.nn.ops import Ops, Places


class Layer(nn.Module):
    """Pre-norm residual layer: x + attention(norm(x)), then x + mlp(norm(x)); between them, if it `reads` a source,
    x + cross-attention(norm(x)).

    The last addition is left to whoever comes next, so that it can be done together with the norm that follows it.
    """

    def __init__(self, config: ModelConfig, index: int, dropout: float, reads: bool = False) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.hidden_size)
        self.attn = make_mixer(config, index)
        self.cross_norm = make_norm(config, config.hidden_size) if reads else None
        self.cross = CrossAttention(config, index) if reads else None
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor | None, places: Places, ops: Ops) -> tuple[Tensor, Tensor | None]:
        """The residual stream x and what is still to be added to it, before this layer -> after it."""
        x, h = ops.add_norm(x, update, self.attn_norm)
        update = self.dropout(self.attn(h, places, ops))
        if self.cross is not None and self.cross_norm is not None:
            x, h = ops.add_norm(x, update, self.cross_norm)
            update = self.dropout(self.cross(h, ops))
        x, h = ops.add_norm(x, update, self.mlp_norm)
        return x, self.dropout(self.mlp(h, ops))


class PostNormLayer(Layer):
    """The same parts in the order of 2017 (arXiv 1706.03762, 3.1): norm(x + attention(x)), then norm(x + mlp(x)).
    Nothing is left to be added."""

    def forward(self, x: Tensor, update: Tensor | None, places: Places, ops: Ops) -> tuple[Tensor, Tensor | None]:
        _, x = ops.add_norm(x, self.dropout(self.attn(x, places, ops)), self.attn_norm)
        if self.cross is not None and self.cross_norm is not None:
            _, x = ops.add_norm(x, self.dropout(self.cross(x, ops)), self.cross_norm)
        _, x = ops.add_norm(x, self.dropout(self.mlp(x, ops)), self.mlp_norm)
        return x, None


def make_layers(config: ModelConfig, num_layers: int, dropout: float, reads: bool = False) -> nn.ModuleList:
    """So many layers of the kind that a config asks for."""
    kind = PostNormLayer if config.post_norm else Layer
    return nn.ModuleList(kind(config, i, dropout, reads) for i in range(num_layers))


def make_last_norm(config: ModelConfig) -> nn.Module | None:
    """The norm after the last layer, None where the layers' own stand at their ends."""
    return None if config.post_norm else make_norm(config, config.hidden_size)


def run_layers(layers: nn.ModuleList, norm: nn.Module | None, x: Tensor, places: Places, ops: Ops) -> Tensor:
    """Rows [n, hidden] through all layers and the last norm -> rows [n, hidden]."""
    update: Tensor | None = None
    for layer in layers:
        x, update = layer(x, update, places, ops)
    return x if norm is None else ops.add_norm(x, update, norm)[1]
