"""How fast the machine reads memory, by a C program that is compiled when it is first needed: the roof of decoding."""

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("sweep.c")
BYTES = 2**30
REPEATS = 3  # in one process, of which the best counts


class Bandwidth:
    """Read-only sweeps over 1 GiB. Raises `RuntimeError` where there is no C compiler."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("no C compiler for the sweep of memory")
        folder.mkdir(parents=True, exist_ok=True)
        self._program, self._num_threads = folder / "sweep", num_threads
        subprocess.run(
            [compiler, "-O3", "-march=native", "-pthread", str(SOURCE), "-o", str(self._program)], check=True
        )

    def sweep(self) -> float:
        """Bytes per second of the best of a few passes made one after the other."""
        command = [str(self._program), str(self._num_threads), str(BYTES), str(REPEATS)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(said) * 1e9
