"""Which contenders there are here, and how each is started; whoever can't be is left out with the reason."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.peers import checkpoints
from loadtests.peers.bars import BARE, LLAMA, NAMES, OPENVINO, OURS, TRANSFORMERS
from loadtests.peers.checkpoints import HOME, TOOLS, Shape
from loadtests.peers.contenders import FAILURES, MILLRACE, Child, Contender, Served, python
from loadtests.peers.contenders import LLAMA as LLAMA_DIALECT
from loadtests.peers.engine_child import MAX_LEN

PROGRAMS = Path(__file__).parent / "programs"
LLAMA_SERVER = HOME / "bin" / "llama-server"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is started: a checkpoint in a precision, for at most so many streams. `arguments` are added to ours."""

    shape: Shape
    dtype: str
    num_threads: int
    max_streams: int
    arguments: str = ""


@contextmanager
def started(setting: Setting, names: Sequence[str]) -> Iterator[tuple[dict[str, Contender], dict[str, str]]]:
    """The contenders that run, and why others do not; all are stopped in the end."""
    running: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        for name in NAMES:
            if name not in names:
                left_out[name] = "not asked for"
                continue
            try:
                contender = STARTERS[name](setting, HOME / f"{name.replace(' ', '-')}.log")
            except FAILURES as error:
                left_out[name] = str(error)
                print(f"!! {name} is left out: {error}", flush=True)
                continue
            stack.callback(contender.stop)
            running[name] = contender
        yield running, left_out


def _millrace(setting: Setting, log: Path) -> Contender:
    command = python("-m", "service.cli", "serve")
    flags = ["--dtype", "bfloat16"]
    if setting.dtype == "int8":
        flags += ["--quantize", "int8"]
        helped = subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
        if "--quantize" not in helped:
            raise RuntimeError("`millrace serve` has no --quantize")
    command += ["--model", str(checkpoints.folder(setting.shape)), "--port", "{port}", *flags]
    command += ["--threads", str(setting.num_threads), "--max-model-len", str(MAX_LEN)]
    return Served(OURS, [*command, *shlex.split(setting.arguments)], setting.num_threads, log, MILLRACE)


def _bare(setting: Setting, log: Path) -> Contender:
    folder = checkpoints.folder(setting.shape)
    command = python("-m", "loadtests.peers.engine_child", str(folder), setting.dtype, str(setting.num_threads))
    return Child(BARE, command, setting.num_threads, log)


def _llama(setting: Setting, log: Path) -> Contender:
    program = os.environ.get("LLAMA_SERVER") or (str(LLAMA_SERVER) if LLAMA_SERVER.exists() else None)
    program = shutil.which(program or "llama-server")
    if program is None:
        raise RuntimeError("no llama-server: run `make peers`, or set LLAMA_SERVER to one")
    num_slots, threads = setting.max_streams, str(setting.num_threads)
    command = [program, "-m", str(checkpoints.gguf(setting.shape, setting.dtype)), "--port", "{port}"]
    command += ["--threads", threads, "--threads-batch", threads, "--parallel", str(num_slots)]
    command += ["--ctx-size", str(num_slots * MAX_LEN), "--fit", "off"]
    # No prompt comes twice: its stores of old prompts would only cost it time.
    command += ["--no-cache-prompt", "--cache-ram", "0", "--no-ui"]
    return Served(LLAMA, command, setting.num_threads, log, LLAMA_DIALECT)


def _openvino(setting: Setting, log: Path) -> Contender:
    if not TOOLS.exists():
        raise RuntimeError("not installed: run `make peers`")
    folder = checkpoints.openvino(setting.shape, setting.dtype)
    command = [str(TOOLS), "-u", str(PROGRAMS / "openvino_child.py"), str(folder)]
    return Child(OPENVINO, [*command, str(setting.num_threads), str(setting.max_streams)], setting.num_threads, log)


def _transformers(setting: Setting, log: Path) -> Contender:
    """The faster of its two ways to attend is found by the caller; it starts with sdpa."""
    folder = checkpoints.folder(setting.shape)
    command = python("-m", "loadtests.peers.transformers_child", str(folder), str(setting.num_threads))
    return Child(TRANSFORMERS, command, setting.num_threads, log, attention="sdpa")


STARTERS: dict[str, Callable[[Setting, Path], Contender]] = {
    OURS: _millrace,
    BARE: _bare,
    LLAMA: _llama,
    OPENVINO: _openvino,
    TRANSFORMERS: _transformers,
}
