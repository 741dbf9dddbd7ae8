"""Compiles the core: `python -m model.native.build`. Installing the package does the same where a compiler is there.

One source, and one library for each kind of processor it knows; `library.py` picks one when it is loaded. Nothing but
the standard library is imported here, since an installation runs it before anything else is there.
"""

import hashlib
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas",
)  # fmt: skip
AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16"))
TARGETS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", *AVX512),
    "amx": ("-mavx2", "-mfma", *AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
"""The processor's kinds, in the order of `millrace_level`, and what the compiler is told of each."""


def targets() -> tuple[str, ...]:
    """The kinds that this machine's compiler can be asked for."""
    return tuple(TARGETS) if platform.machine() in ("x86_64", "AMD64") else ("portable",)


@cache
def file_name(target: str) -> str:
    """Of the library for one kind of processor. It names the sources, so that one made of others is not found:
    `library.py` would hand it structs of another shape."""
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return f"core_{target}_{digest[:12]}.so"


def find_compiler() -> str | None:
    """The first C++ compiler on the path."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def build(folder: Path = HERE) -> None:
    """Compile every library into `folder`, in place of older ones.

    Raises RuntimeError with what the compiler said, or that there is none.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(f"no C++ compiler found: none of {', '.join(COMPILERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    for target in targets():
        new = folder / (file_name(target) + ".new")
        sources = map(str, sorted(HERE.glob("*.cpp")))
        command = [compiler, *FLAGS, *TARGETS[target], *sources, "-o", str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
        new.replace(folder / file_name(target))  # at once: nobody ever sees half a library
    for old in set(folder.glob("core_*.so")) - {folder / file_name(target) for target in targets()}:
        old.unlink()


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as error:
        sys.exit(str(error))
