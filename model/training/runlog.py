"""What a run leaves to look at: loss.csv, a row a step, and loss.png."""

import csv
from collections.abc import Iterator
from pathlib import Path

COLUMNS = ("step", "tokens", "seconds", "lr", "train_nats", "valid_nats", "valid_bits_per_byte")


class RunLog:
    """loss.csv. Rows after the checkpoint that a run starts from are dropped: they will come again."""

    def __init__(self, file: Path, step: int) -> None:
        kept = [row for row in read_log(file) if int(row["step"]) <= step]
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0  # spent before now
        self._file, temporary = file, file.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(file)

    def write(self, row: dict[str, float]) -> None:
        """Append one step's figures; the validation columns may be absent."""
        with self._file.open("a", newline="", encoding="utf-8") as handle:
            shown = {name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()}
            csv.DictWriter(handle, COLUMNS).writerow(shown)


def read_log(file: Path) -> Iterator[dict[str, str]]:
    """Rows of a loss.csv, none when there is no file. A last line cut short by a kill is left out."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        yield from csv.DictReader(line for line in lines if line.endswith("\n"))


def plot(folder: Path) -> str:
    """Draw loss.csv as loss.png; one line that says what was done."""
    try:
        from matplotlib.figure import Figure  # an extra of the package: training works without
    except ImportError:
        return "no loss.png: matplotlib is not installed (pip install matplotlib)"
    rows = list(read_log(folder / "loss.csv"))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    axes.plot([int(r["step"]) for r in rows], [float(r["train_nats"]) for r in rows], linewidth=0.6, label="training")
    checked = [r for r in rows if r["valid_nats"]]
    axes.plot([int(r["step"]) for r in checked], [float(r["valid_nats"]) for r in checked], "o-", label="validation")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    return f"drew {folder / 'loss.png'}"
