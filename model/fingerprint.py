"""What makes two model folders the same model: a hash of what the door reads and a hash of what the engine computes.

No torch: an API process takes its own fingerprint at every start. It knows file names and bytes, and no meaning.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOOR_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WHOLE_BYTES = 64 * 2**20  # a weight file up to this size is read whole
NUM_PIECES, PIECE_BYTES = 256, 64 * 2**10  # of a larger one
HEADER_LIMIT_BYTES = 100_000_000  # of the safetensors format; a file that claims more is refused where it is loaded
NUM_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`door`: config, generation settings and tokenizer. `weights`: the tensors, None where the folder has none. Both
    are the first 16 hex digits of a SHA-256."""

    door: str
    weights: str | None


def fingerprint(folder: Path) -> Fingerprint:
    """The fingerprint of a model folder. Raises `OSError` for a file that can't be read.

    A weight file above 64 MiB goes in with its name, size and header and 256 pieces of 64 KiB, evenly spaced, the first
    and the last among them, because reading all of it would take an API process longer than its whole start. Two files
    that agree in all of that and differ only between the pieces are taken for one: training, quantising or converting
    changes numbers everywhere and is noticed, an edit of a few rows can be missed, and this is no defence against
    someone who wants to be missed.
    """
    door = hashlib.sha256()
    for name in DOOR_FILES:
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            door.update(_title(path, len(content)))
            door.update(content)
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    weights = hashlib.sha256()
    for path in files:
        for piece in _pieces(path):
            weights.update(piece)
    return Fingerprint(door.hexdigest()[:NUM_DIGITS], weights.hexdigest()[:NUM_DIGITS] if files else None)


def queue_name(door: str, weights: str, number_format: str, max_model_len: int, protocol: int) -> str:
    """The queue that only workers read which compute the same: 16 hex digits. For the format of numbers see
    `EngineConfig.number_format`."""
    words = f"{protocol} {door} {weights} {number_format} {max_model_len}"
    return hashlib.sha256(words.encode()).hexdigest()[:NUM_DIGITS]


def _title(path: Path, size: int) -> bytes:
    return f"{path.name}\0{size}\0".encode()  # neither can run into what follows


def _pieces(path: Path) -> Iterator[bytes]:
    """What goes into the hash of one weight file. The header is its own length, 8 bytes, and then so many."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield _title(path, size)
        if size <= WHOLE_BYTES:
            while piece := file.read(2**20):
                yield piece
            return
        length = file.read(8)
        yield length
        yield file.read(min(int.from_bytes(length, "little"), HEADER_LIMIT_BYTES))
        for i in range(NUM_PIECES):
            file.seek((size - PIECE_BYTES) * i // (NUM_PIECES - 1))
            yield file.read(PIECE_BYTES)
