"""A decoder as the core wants it: every matrix in the order in which it is read, in memory of large pages.

It owns the packed numbers and keeps what the core points at alive. It knows no step and no request.
"""

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.cache.store import PagedStore
from model.config import ModelConfig
from model.native import library as lib
from model.nn.decoder import Decoder
from model.nn.quantized import Int8Weight, quantize_weight

GROUPS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # inputs that stand together
PRECISIONS = {torch.float32: lib.FLOAT32, torch.bfloat16: lib.BFLOAT16, torch.int8: lib.INT8}
SPARE_BYTES = 4096  # behind every matrix: the core may look there
PIECE_BYTES, ALIGNED_BYTES = 2**26, 64  # of which only what is written takes memory
Weight = Tensor | Int8Weight


def why_not(config: ModelConfig, dtype: torch.dtype, block_size: int) -> str | None:
    """Why the core can't compute such a network, None if it can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if block_size % 16:
        return f"its blocks have a multiple of 16 tokens, not {block_size}"
    if config.encoder_layers:
        return "it computes decoders without an encoder"
    needs_pairs = config.position == "rope" or dtype == torch.bfloat16
    return "rotary positions and bfloat16 need heads of even size" if needs_pairs and config.head_dim % 2 else None


class Packed:
    """`network` and `layers` for `millrace_open`; the memory they point at lives as long as this object.

    `int8`: matrices become int8, if they are not already. `drop`: the decoder's own matrices are given up one
    by one as they are packed, so that the weights are in memory once; it keeps its shapes and can't compute any more.
    """

    def __init__(self, decoder: Decoder, store: PagedStore, dtype: torch.dtype, int8: bool, drop: bool) -> None:
        self.config, self.drop = decoder.config, drop
        self.dtype = torch.int8 if int8 else dtype
        self._arena = _Arena()
        self.num_bytes = 0
        self.layers = (lib.Layer * self.config.num_layers)()
        embed = decoder.embed.weight
        head = decoder.head
        self.network = lib.Network(
            precision=PRECISIONS[self.dtype],
            cache_bfloat16=store.keys.dtype == torch.bfloat16,
            activation=lib.ACTIVATIONS.index(self.config.activation),
            gated=self.config.gated_mlp,
            num_layers=self.config.num_layers,
            hidden=self.config.hidden_size,
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            inner=self.config.intermediate_size,
            vocab=self.config.vocab_size,
            block_size=store.block_size,
            num_blocks=store.num_blocks,
            eps=self.config.norm_eps,
            norm=self._norm(decoder.norm),
            head=self._linear([embed if head is None else head.weight], None),
            layers=self.layers,
        )
        if head is None and not int8:
            self.network.embed_kind = lib.IN_HEAD
        else:
            self.network.embed_kind = lib.ROWS_BFLOAT16 if dtype == torch.bfloat16 else lib.ROWS_FLOAT32
            self.network.embed = self._keep(_rows(embed, dtype))
        self._positions(decoder)
        if drop:
            for module in (decoder.embed, head):
                _forget(module)
        for i, (layer, packed) in enumerate(zip(decoder.layers, self.layers, strict=True)):
            self._layer(layer, packed)
            packed.keys, packed.values = store.keys[i].data_ptr(), store.values[i].data_ptr()
            packed.window = self.config.window(i) or 0
        if drop:
            _give_back()

    def _positions(self, decoder: Decoder) -> None:
        if decoder.rotary is not None:
            self.network.cosine = self._keep(decoder.rotary.get_buffer("cos"))
            self.network.sine = self._keep(decoder.rotary.get_buffer("sin"))
        elif isinstance(decoder.positions, nn.Embedding):
            self.network.positions = self._keep(decoder.positions.weight.float())
        elif decoder.positions is not None:
            self.network.positions = self._keep(decoder.positions.get_buffer("table").float())

    def _layer(self, layer: Any, packed: lib.Layer) -> None:
        attn, mlp = layer.attn, layer.mlp
        packed.attn_norm, packed.mlp_norm = self._norm(layer.attn_norm), self._norm(layer.mlp_norm)
        if attn.q_norm is not None and attn.k_norm is not None:
            packed.q_norm = self._keep(attn.q_norm.weight.float())
            packed.k_norm = self._keep(attn.k_norm.weight.float())
        packed.qkv = self._linear([attn.qkv.weight], attn.qkv.bias)
        packed.out = self._linear([attn.out.weight], attn.out.bias)
        packed.up = self._linear(_halves(mlp.up.weight) if mlp.gated else [mlp.up.weight], mlp.up.bias)
        packed.down = self._linear([mlp.down.weight], mlp.down.bias)
        if self.drop:
            for module in (attn.qkv, attn.out, mlp.up, mlp.down):
                _forget(module)

    def _norm(self, norm: Any) -> lib.Norm:
        bias = getattr(norm, "bias", None)
        return lib.Norm(self._keep(norm.weight.float()), None if bias is None else self._keep(bias.float()))

    def _linear(self, parts: Sequence[Weight], bias: Tensor | None) -> lib.Linear:
        """Matrices [out, in] of one shape, whose panels take turns."""
        packed = lib.Linear()
        if self.dtype == torch.int8:
            small = [part if isinstance(part, Int8Weight) else quantize_weight(part) for part in parts]
            matrices = [part.numbers for part in small]
            sums = [128 * matrix.sum(dim=1, dtype=torch.int32) for matrix in matrices]
            packed.scales = self._keep(_by_panel([part.scales for part in small]))
            packed.sums = self._keep(_by_panel(sums))
        else:
            matrices = [part.to(self.dtype) for part in parts if isinstance(part, Tensor)]
        packed.num_out, packed.num_in = matrices[0].shape
        packed.weights = self._keep(_panels(matrices))
        if bias is not None:
            packed.bias = self._keep(_by_panel(bias.float().chunk(len(parts))))
        return packed

    def _keep(self, numbers: Tensor) -> int:
        """The address of a copy that stays."""
        self.num_bytes += numbers.nbytes
        return self._arena.keep(numbers)


def _rows(weight: Weight, dtype: torch.dtype) -> Tensor:
    """An embedding's rows, as the network looks them up."""
    if isinstance(weight, Int8Weight):
        return (weight.numbers.float() * weight.scales[:, None]).to(dtype)
    return weight.to(dtype)


def _halves(weight: Weight) -> Sequence[Weight]:
    """The two matrices that stand one above the other."""
    if isinstance(weight, Int8Weight):
        pairs = zip(weight.numbers.chunk(2), weight.scales.chunk(2), strict=True)
        return [Int8Weight(numbers, scales) for numbers, scales in pairs]
    return weight.chunk(2)


def _panels(parts: Sequence[Tensor]) -> Tensor:
    """[panels, parts, in / group, PANEL, group], zeros where a panel or a group is not full."""
    group = GROUPS[parts[0].dtype]
    (num_out, num_in), num = parts[0].shape, -(-parts[0].shape[0] // lib.PANEL)
    whole = torch.zeros(num, len(parts), -(-num_in // group), lib.PANEL, group, dtype=parts[0].dtype)
    for i, part in enumerate(parts):
        padded = nn.functional.pad(part, (0, -num_in % group, 0, -num_out % lib.PANEL))
        whole[:, i] = padded.view(num, lib.PANEL, -1, group).transpose(1, 2)
    return whole


def _by_panel(parts: Sequence[Tensor]) -> Tensor:
    """Numbers of each channel, in the order of `_panels`."""
    padded = [nn.functional.pad(part, (0, -part.shape[0] % lib.PANEL)).view(-1, lib.PANEL) for part in parts]
    return torch.stack(padded, dim=1)


class _Arena:
    """Memory in pages of 2 MiB where the system has them: fewer misses of the translation buffer. Small matrices share
    a piece, since none of them alone would fill such a page; private, since Linux rarely gives large pages to others.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._used = 0

    def keep(self, numbers: Tensor) -> int:
        """The address of a copy that stays."""
        size = numbers.nbytes + SPARE_BYTES
        if not self._pieces or self._used + size > self._pieces[-1].nbytes:
            self._pieces.append(_piece(max(size, PIECE_BYTES)))
            self._used = 0
        copy = self._pieces[-1][self._used : self._used + numbers.nbytes].view(numbers.dtype)
        copy.copy_(numbers.detach().flatten())
        self._used += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
        return copy.data_ptr()


def _piece(size: int) -> Tensor:
    """Bytes that take memory only where they have been written."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _forget(module: nn.Module | None) -> None:
    """Give up a module's parameters, but not their shapes."""
    if module is not None:
        module.to("meta")


def _give_back() -> None:
    """Freed memory returns to the system: the C library would keep what a loaded checkpoint took for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Core:
    """A packed network, its threads and its buffers. One caller at a time."""

    def __init__(self, library: ctypes.CDLL, packed: Packed, num_threads: int, max_rows: int, max_len: int) -> None:
        self._library, self._packed = library, packed
        packed.network.max_rows, packed.network.max_len = max_rows, max_len
        self._core = ctypes.c_void_p(library.millrace_open(ctypes.byref(packed.network), num_threads))

    def step(self, step: lib.Step) -> None:
        """Compute a step into the memory that it points at."""
        self._library.millrace_step(self._core, ctypes.byref(step))

    def __del__(self) -> None:
        self._library.millrace_close(self._core)
