"""`millrace attention`: a picture of where each head looks. A part of the composition root, like `terminal.py`.

Every head of every layer as a small map, one of them large with its tokens. Rows look, columns are looked at; of a
network with two texts, as a translator has, these may be different ones.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.engine.engine import Engine
from model.families.registry import read_config
from model.nn.decoder import Decoder
from model.nn.maps import alignment_maps, attention_maps
from model.request import Request, SamplingParams, begun
from model.tokenizer import Tokenizer
from model.weights import load_network
from service.errors import StartupError
from service.settings import BUNDLED

MOST_TOKENS = 512
MOST_ANSWER = 128
MOST_LABELS = 64  # of the large map: more could not be read


@dataclass(frozen=True, slots=True)
class Maps:
    """Weights [layers, heads, rows, columns]; the tokens of rows look at those of columns."""

    weights: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def most_telling(self) -> tuple[int, int]:
        """The layer and head that look hardest at tokens which are neither the row's own, nor the one before, nor the
        first: those are where a head looks that has little to say."""
        telling = self.weights.clone()
        telling[..., 0] = 0
        if self.rows == self.columns:
            for offset in (0, -1):
                telling.diagonal(offset, dim1=-2, dim2=-1).zero_()
        peaks = telling.amax(-1).mean(-1)
        return divmod(int(peaks.argmax()), peaks.shape[1])


def attention(args: argparse.Namespace) -> None:
    """Compute, draw, and say where it is."""
    folder = Path(args.model) if args.model else BUNDLED
    maps = maps_of(folder, args.text)
    layer, head = maps.most_telling()
    layer, head = args.layer if args.layer is not None else layer, args.head if args.head is not None else head
    num_layers, num_heads = maps.weights.shape[:2]
    if not (0 <= layer < num_layers and 0 <= head < num_heads):
        raise StartupError(
            f"--layer {layer} --head {head}: there are layers 0-{num_layers - 1}, heads 0-{num_heads - 1}"
        )
    draw(maps, layer, head, args.out)
    told = f"drew {args.out}: {num_layers} layers of {num_heads} heads; large: layer {layer}, head {head}"
    sys.stderr.write(told + "\n")


def maps_of(folder: Path, text: str) -> Maps:
    """Of a text, by the model in a folder; of its greedy answer and the text, where the model has an encoder beside its
    decoder. Raises `CheckpointError` and `StartupError`."""
    config, tokenizer = read_config(folder), Tokenizer.load(folder)
    ids = tokenizer.encode(text)
    if not 0 < len(ids) <= min(MOST_TOKENS, config.max_position):
        raise StartupError(f"the text has {len(ids)} tokens, expected 1 to {min(MOST_TOKENS, config.max_position)}")
    _check(config)
    network = load_network(folder, config, torch.float32, torch.device("cpu"))

    def shown(token_ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(map(tokenizer.token_text, token_ids))

    if config.start_id is None:
        return Maps(attention_maps(network, ids), shown(ids), shown(ids))
    assert isinstance(network, Decoder)
    answer = _answer(folder, ids, config.start_id, config.eos_ids)
    return Maps(alignment_maps(network, ids, answer), shown(answer), shown(ids))


def _check(config: ModelConfig) -> None:
    """Raises `StartupError` where a layer has no map."""
    if any(not kind.is_full for kind in config.attention):
        raise StartupError("no maps of this model: not all of its layers compare each token with all before it")


def _answer(folder: Path, ids: Sequence[int], start_id: int, eos_ids: tuple[int, ...]) -> list[int]:
    """The ids that an engine answers a source with, greedy, the last one included."""
    engine = Engine.load(folder, dtype="float32", device="cpu", max_num_seqs=1)
    prompt_ids, source_ids = begun(tuple(ids), start_id)
    greedy = SamplingParams(temperature=0.0, max_tokens=MOST_ANSWER, stop_token_ids=eos_ids, eos_ids=eos_ids)
    engine.add(Request("answer", prompt_ids, greedy, source_ids=source_ids))
    answer = list[int]()
    while engine.has_work():
        answer += [id for delta in engine.step() for id in delta.token_ids]
    return answer


def looker(folder: Path) -> Callable[[list[int]], list[list[list[float]]]]:
    """What computes for the chat page: token ids -> by layer and head, how much the last one takes of each, to four
    places. It has weights of its own, in float32, since a runner may have packed the others. Raises
    `CheckpointError` and `StartupError`."""
    config = read_config(folder)
    _check(config)
    if config.start_id is not None:
        raise StartupError("--attention-view: not of a model with an encoder; `millrace attention` draws its alignment")
    network = load_network(folder, config, torch.float32, torch.device("cpu"))

    def look(ids: list[int]) -> list[list[list[float]]]:
        last = attention_maps(network, ids)[:, :, -1]
        return [[[round(weight, 4) for weight in head] for head in layer] for layer in last.tolist()]

    return look


def draw(maps: Maps, layer: int, head: int, out: Path) -> None:
    """The picture, in the format that the file's name ends with. Raises `StartupError` without matplotlib."""
    try:
        from matplotlib.figure import Figure  # an extra of the package
    except ImportError:
        raise StartupError("drawing needs matplotlib: pip install 'millrace[train]'") from None
    num_layers, num_heads = maps.weights.shape[:2]
    side = max(6.0, 0.22 * min(len(maps.columns), MOST_LABELS) + 2)
    figure = Figure(figsize=(1.1 * num_heads + side + 1, max(1.2 * num_layers + 0.6, side)), layout="constrained")
    small, large = _parts(figure.subfigures(1, 2, width_ratios=(1.1 * num_heads, side)))
    small.suptitle("every layer (down) and head (across)", fontsize=10)
    for index, axes in enumerate(small.subplots(num_layers, num_heads, squeeze=False).flat):
        which = divmod(index, num_heads)
        axes.imshow(maps.weights[which].numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.set_title(
            f"{which[0]}.{which[1]}", fontsize=6, pad=2, color="crimson" if which == (layer, head) else "black"
        )
    _large(large.subplots(), maps, layer, head)
    figure.savefig(out, dpi=130)


def _parts(subfigures: Any) -> Any:
    """An array of them, whatever the library's types say."""
    return subfigures


def _large(axes: Any, maps: Maps, layer: int, head: int) -> None:
    image = axes.imshow(maps.weights[layer, head].numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(f"layer {layer}, head {head}: rows look at columns", fontsize=10)
    for axis, tokens in ((axes.xaxis, maps.columns), (axes.yaxis, maps.rows)):
        every = -(-len(tokens) // MOST_LABELS)
        axis.set_ticks(range(0, len(tokens), every), labels=[_shown(token) for token in tokens[::every]], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label="weight")


def _shown(token: str) -> str:
    """A token's text that can be seen, and holds nothing that a label would take for a formula."""
    return token.replace(" ", "·").replace("\n", "¶").replace("$", r"\$") or "∅"
