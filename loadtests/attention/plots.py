"""Two pictures: what a stream has in memory, and how fast it goes on, by its length; a line for each kind."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from loadtests.attention.lengths import Measured


def draw(figures: Mapping[str, Sequence[Measured]], folder: Path) -> None:
    """memory.png and speed.png."""
    for name, label in (("memory", "KiB of a stream"), ("speed", "tokens per second of processor time")):
        figure = Figure(figsize=(8.5, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens so far", ylabel=label, xscale="log", yscale="log")
        for (kind, points), look in zip(figures.items(), cycle(("o-", "s--", "^:", "D-.")), strict=False):
            values = [p.num_bytes / 2**10 if name == "memory" else 1e3 / p.cpu_ms for p in points]
            axes.plot([p.num_tokens for p in points], values, look, label=kind, markersize=5)
        ticks = sorted({p.num_tokens for points in figures.values() for p in points})
        axes.set_xticks(ticks, [f"{n // 1024} k" for n in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(folder / f"{name}.png", dpi=120)
