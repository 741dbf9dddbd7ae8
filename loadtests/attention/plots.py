"""Two pictures: what a stream has in memory, and how fast it goes on, by its length; a line for each kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from loadtests.attention.lengths import Measured


def draw(figures: Mapping[str, Sequence[Measured]], folder: Path) -> None:
    """memory.png and speed.png."""
    for name, label in (("memory", "MiB of a stream"), ("speed", "tokens/s of a stream")):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens so far", ylabel=label, xscale="log", yscale="log")
        for kind, points in figures.items():
            values = [p.num_bytes / 2**20 if name == "memory" else 1e3 / p.cpu_ms for p in points]
            axes.plot([p.num_tokens for p in points], values, "o-", label=kind, markersize=4)
        ticks = sorted({p.num_tokens for points in figures.values() for p in points})
        axes.set_xticks(ticks, [f"{n // 1024} k" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=120)
