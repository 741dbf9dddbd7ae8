"""Compiles the native core when the package is installed, where there is a compiler. Everything else is said in
pyproject.toml. Without a compiler the installation goes on, and the package computes with torch alone."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from model.native.build import build  # noqa: E402  (of this folder, which an isolated build does not have on its path)


class BuildCore(build_ext):
    """Instead of one extension for Python: the libraries that `model/native/build.py` makes, beside it."""

    def run(self) -> None:
        folder = ROOT if self.inplace or getattr(self, "editable_mode", False) else Path(self.build_lib)
        try:
            build(folder / "model" / "native")
        except RuntimeError as error:
            sys.stderr.write(f"the native core is left out: {error}\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("model.native.core", [], optional=True)], cmdclass={"build_ext": BuildCore})
