"""The house as law: which room may import which, who may know torch, who may read the environment.

Imports are read from the syntax tree, inside functions and under TYPE_CHECKING too: a hidden import is still an arrow.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

GRAMMAR = ("model.grammar", "model.grammar_check")
HALL = (
    "model.request",
    "model.config",
    "model.kinds",
    "model.chat_template",
    "model.tokenizer",
    "model.assemble",
    *GRAMMAR,
)
COMMON = ("service.settings", "service.errors", "service.metrics", "service.logs", "service.traces", "model.request")
ENGINE = (
    "model.cache",
    "model.nn",
    "model.sampling",
    "model.weights",
    "model.engine",
    "model.families",
    "model.native",
)

# room -> the rooms of ours it may import; its own modules always; the longest matching name is the room
ALLOWED: dict[str, tuple[str, ...]] = {
    "model.request": (),
    "model.config": ("model.kinds",),
    "model.kinds": (),
    "model.chat_template": ("model.config",),
    "model.tokenizer": ("model.config", "model.chat_template"),
    "model.assemble": ("model.request", "model.tokenizer"),
    "model.grammar": ("model.request",),
    "model.grammar_check": ("model.request", "model.grammar"),
    "model.fingerprint": (),
    "model.families": ("model.config", "model.kinds"),
    "model.nn": ("model.config", "model.kinds", "model.cache.store", "model.cache.cross", "model.cache.states"),
    "model.native": ("model.config", "model.nn.decoder", "model.nn.quantized", "model.cache.store"),
    "model.cache": ("model.config",),
    "model.sampling": ("model.request",),
    "model.weights": ("model.families", "model.nn", "model.config"),
    "model.engine": (*HALL, *ENGINE),
    "model.training": (*HALL, "model.nn", "model.families"),
    "model.bundled": (),
    "service.settings": ("model.request",),
    "service.errors": ("model.request",),
    "service.metrics": ("model.request", "service.settings", "service.errors"),
    "service.metrics_work": (*COMMON, "service.broker.base", "service.worker"),
    "service.traces": ("model.request", "service.errors"),
    "service.pulse": ("service.logs", "service.metrics_work"),
    "service.keys": ("service.errors",),
    "service.logs": ("model.request", "service.settings", "service.errors"),
    "service.broker": COMMON,
    "service.http": (*COMMON, "service.keys", "service.broker.base", *HALL),
    "service.worker": (*COMMON, "service.broker.base", *HALL, "model.engine.engine"),
    "service.cli": ("model", "service"),
    "service.serve": ("model", "service"),
    "service.api": ("model", "service"),
    "service.door": ("model", "service"),
    "service.scrape": ("service.listen", "service.settings"),
    "service.listen": ("service.errors", "service.http.protocol"),
    "service.work": ("model", "service"),
    "service.health": ("service.settings",),
    "service.keeper": (*COMMON, "service.broker.redis", "service.child"),
    "service.child": (),
    "service.lookout": ("model.fingerprint", "service.broker.redis"),
    "service.terminal": ("model", "service"),
    "service.attention": ("model", "service"),
}
TORCH_FREE = (
    "model.cache.blocks",
    "model.engine.sequence",
    "model.engine.scheduler",
    "model.families",
    "model.fingerprint",
    "model.native.build",
    "model.native.library",
    *HALL,
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 70  # alarms, a little above the guide of 350 and 50


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(p): p for room in ("model", "service") for p in sorted((ROOT / room).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[str]:
    """Every module that `name` imports, ours as full module names."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (full if full in MODULES else node.module for full in whole)


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str:
    return max((room for room in ALLOWED if inside(name, room)), key=len, default="")


def ours(name: str) -> set[str]:
    return {found for found in imports(name) if found in MODULES} - {name}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_where_the_table_says(name: str) -> None:
    if name in ("model", "service"):
        return
    room = room_of(name)
    assert room, f"{name} stands in no room of the table"
    allowed = (room, *ALLOWED[room])
    forbidden = [found for found in ours(name) if not any(inside(found, ok) for ok in allowed)]
    assert not forbidden, f"{name} may not import {forbidden}"


def test_there_is_no_circle() -> None:
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()


def closure(start: str) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        for found in ours(todo.pop()) - seen:
            seen.add(found)
            todo.append(found)
    return seen


@pytest.mark.parametrize("start", [*TORCH_FREE, "service.http.app", "service.broker", "service.api", "service.keeper"])
def test_torch_stays_out_of(start: str) -> None:
    for module in (m for m in MODULES if inside(m, start)):
        guilty = [name for name in closure(module) if any(inside(found, "torch") for found in imports(name))]
        assert not guilty, f"{module} reaches torch through {guilty}"


def test_halves_meet_only_at_the_broker_base() -> None:
    reached = closure("service.http.app")
    assert not {name for name in reached if inside(name, "service.worker") or inside(name, "service.broker.memory")}


def test_only_settings_reads_the_environment() -> None:
    guilty = [
        name
        for name, tree in TREES.items()
        if name != "service.settings"
        and any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in ast.walk(tree))
    ]
    assert not guilty


def test_nothing_unpickles_or_evaluates() -> None:
    """No pickle, marshal, torch.load, eval, exec on any path."""
    banned_modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "transformers"}
    for name, tree in TREES.items():
        assert not banned_modules & {found.split(".")[0] for found in imports(name)}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_are_documented_small_and_empty_at_the_door(name: str) -> None:
    tree, text = TREES[name], MODULES[name].read_text(encoding="utf-8")
    if MODULES[name].name == "__init__.py":
        assert not text.strip(), "an __init__ that re-exports makes circles"
        return
    assert ast.get_docstring(tree), f"{name} does not say what it owns"
    assert len(text.splitlines()) <= LONGEST_FILE, f"{name}: a part wants to leave"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{name}.{node.name} is too long"
