"""Linear layers with weights of one byte: the format, how numbers get into it, and how it is multiplied.

Symmetric: a number is an int8 times a scale, one scale for each output channel of a weight and, where activations are
quantised too, one for each row, taken from that row alone, so that no row depends on another. A sum of products of
int8 is a whole number and exact in any order. It knows neither files nor families.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST = 127
TINY = torch.finfo(torch.float32).tiny
SLICE = 1024
"""Products of int8 that float32 adds up exactly, in any order: SLICE * MOST * MOST is less than 2 ** 24."""
BLOCK = 4096
"""Rows of a weight that are held as floats at a time."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [m, k]: row i is `numbers[i]` (int8) times `scales[i]` (float32 [m])."""

    numbers: Tensor
    scales: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [n, k] by this weight, plus bias [m] -> [n, m] in x's dtype. On a CPU x is quantised too and the sums are
        exact; on a GPU, where only the weight's bytes matter, x stays what it is."""
        if x.device.type != "cpu":
            return linear_scaled(x, self, bias)
        numbers, scales = quantize(x)
        out = int8_sums(numbers, self.numbers).float().mul_(scales[:, None]).mul_(self.scales)
        return (out if bias is None else out.add_(bias)).to(x.dtype)


def linear_scaled(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The product with x as it is, in float32: the twin of the kernel for GPUs."""
    out = F.linear(x.float(), weight.numbers.float()).mul_(weight.scales)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers int8 [n, k] and scales float32 [n] of rows x [n, k]: scale = the largest magnitude / 127, rounded half to
    even. A row of zeros has scale 0; a row that is not finite has one that is not."""
    wide = x.float()
    scales = torch.linalg.vector_norm(wide, torch.inf, dim=1) / MOST
    return (wide / scales.clamp(min=TINY)[:, None]).round_().to(torch.int8), scales


def quantize_weight(weight: Tensor) -> Int8Weight:
    """A weight [m, k] of any float type, in pieces, so that no float32 copy of the whole is made."""
    parts = [quantize(weight[at : at + BLOCK]) for at in range(0, len(weight), BLOCK)]
    return Int8Weight(torch.cat([numbers for numbers, _ in parts]), torch.cat([scales for _, scales in parts]))


def int8_sums(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] by b [m, k], both int8 on the CPU -> the exact sums [n, m], int32."""
    return torch._int_mm(a, b.t()) if product_is_exact() else int8_sums_slowly(a, b)


@cache
def product_is_exact() -> bool:
    """Whether the library's product of int8 is exact on this processor. Where there is no instruction for it (VNNI),
    pairs are added up in 16 bits, which the largest do not fit into."""
    a, b = torch.full((16, 64), MOST, dtype=torch.int8), torch.full((32, 64), MOST, dtype=torch.int8)
    b[::2] = -MOST
    return all(torch.equal(torch._int_mm(a[:n], b.t()), int8_sums_slowly(a[:n], b)) for n in (1, 16))


def int8_sums_slowly(a: Tensor, b: Tensor) -> Tensor:
    """As `int8_sums`, on any processor: float32 products of slices short enough to be exact."""
    sums = torch.zeros(len(a), len(b), dtype=torch.int32)
    for k in range(0, a.shape[1], SLICE):
        part = a[:, k : k + SLICE].float()
        for m in range(0, len(b), BLOCK):
            sums[:, m : m + BLOCK] += F.linear(part, b[m : m + BLOCK, k : k + SLICE].float()).to(torch.int32)
    return sums


class QuantizedLinear(nn.Module):
    """In the place of an `nn.Linear`: the same bias, and a weight that `Ops.linear` knows."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.empty(plain.weight.shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.empty(plain.out_features))
        self.bias = plain.bias

    @property
    def weight(self) -> Int8Weight:
        """What is multiplied by."""
        return Int8Weight(self.numbers, self.get_buffer("scales"))


class QuantizedEmbedding(nn.Module):
    """In the place of an `nn.Embedding` that is the head too. Rows that are looked up are numbers times scale."""

    def __init__(self, plain: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.numbers = nn.Parameter(torch.empty(plain.weight.shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scales", torch.empty(plain.num_embeddings))

    @property
    def weight(self) -> Int8Weight:
        """What is multiplied by, as a head."""
        return Int8Weight(self.numbers, self.get_buffer("scales"))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [n, k] of ids [n]."""
        return (self.numbers[ids].float() * self.get_buffer("scales")[ids][:, None]).to(self.dtype)


QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


def replace_layers(decoder: nn.Module, tied_head: bool, dtype: torch.dtype) -> None:
    """Put a quantised layer, still empty, in the place of every linear one, and of the embedding if it is the head."""
    for name, layer in list(decoder.named_modules()):
        parent = decoder.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Linear):
            setattr(parent, name.rpartition(".")[2], QuantizedLinear(layer))
        elif tied_head and name == "embed" and isinstance(layer, nn.Embedding):
            setattr(parent, name, QuantizedEmbedding(layer, dtype))
