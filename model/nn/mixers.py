"""Which module mixes the tokens in a layer of each kind, and what its products need of a machine."""

from torch import nn

from model.config import ModelConfig
from model.kinds import FAVOR_BLOCK, Full, Linear, Lstm, RecurrentMemory, Window
from model.nn.attention import Attention
from model.nn.batch import TILE
from model.nn.favor import LinearAttention
from model.nn.lstm import LstmMixer
from model.nn.memory import MemoryAttention
from model.nn.window import WindowAttention


def make_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """A module called with rows [n, hidden], angles and operations; it gives rows [n, hidden]."""
    match config.kind(layer):
        case Full():
            return Attention(config, layer)
        case Window() as kind:
            return WindowAttention(config, layer, kind)
        case RecurrentMemory() as kind:
            return MemoryAttention(config, layer, kind)
        case Linear() as kind:
            return LinearAttention(config, layer, kind)
        case Lstm() as kind:
            return LstmMixer(config, layer, kind)
        case kind:
            raise TypeError(f"no module for {kind}")


def inner_products(config: ModelConfig) -> set[tuple[int, int]]:
    """Pairs (k, n): somewhere in its layers a sequence's own rows of k numbers are multiplied to rows of n, and such
    rows back again."""
    d, found = config.head_dim, {(config.head_dim, TILE)}
    for kind in config.attention:
        match kind:
            case RecurrentMemory():
                found.add((d, kind.segment + kind.memory))
            case Linear():
                found |= {(kind.num_features, FAVOR_BLOCK), (d + 1, FAVOR_BLOCK), (kind.num_features, d + 1)}
            case _:
                pass
    return found
