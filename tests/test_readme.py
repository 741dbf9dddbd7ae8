"""README and ARCHITECTURE tell the truth about the tree: every file has its line, every line its file."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TREE_LINE = re.compile(r"^([\w./-]+\.\w+|Makefile|Dockerfile|LICENSE|\.ci/\w+) {2,}\S", re.MULTILINE)
DEPLOYED = ("deploy/kubernetes/", "deploy/grafana/dashboards/", "deploy/grafana/provisioning/")
SHOWN_AS_A_FOLDER = ("model/bundled/", "loadtests/clients/", "loadtests/fuzz/", "loadtests/peers/", *DEPLOYED)


def tracked() -> set[str]:
    """Files of the project, as git has them; of a source tree without git, what lies there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return {name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()}
    return {str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts}


def told() -> set[str]:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("\n## ")[0]
    return set(TREE_LINE.findall(tree))


def test_every_file_has_one_line_in_the_readme() -> None:
    silent = {name for name in tracked() if not name.endswith("__init__.py") and not name.startswith(SHOWN_AS_A_FOLDER)}
    silent -= {".gitignore", ".dockerignore", "README.md"}
    assert silent - told() == set(), "files without a line in README's tree"


def test_every_line_names_a_file() -> None:
    assert {name for name in told() if not (ROOT / name).exists()} == set()


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_the_library_example_runs_as_it_stands() -> None:
    example = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    command = [sys.executable, "-c", example]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert len(run.stdout.split()) > 10
