"""The product's shape, read from its source: no circle, no arrow upwards, nothing too long to be read at once."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("msam", "experiments", "analysis", "slurm")

LINES_OF_A_FUNCTION, PARAMETERS, LINES_OF_A_FILE = 60, 6, 400

LONGER: dict[str, str] = {}
WIDER = {
    "msam/gradient.py backward": "the options of the public API",
    "msam/graph.py capture": "the options of the public API",
    "msam/reference.py msam_gradient": "the options of the public API",
    "msam/noise.py _Masks._attention": "the signature of torch's attention",
    "slurm/__main__.py submit": "the options of a command line",
}
"""Functions that may be longer or wider, each with the reason."""

ROOMS = ("runs", "tasks", "work", "machine")
HARNESS = "experiments.harness"

MAY_ALSO = {
    "slurm.job": (f"{HARNESS}.work",),  # a job trains
    "slurm.__main__": ("experiments.__main__",),  # --cluster local trains here
}


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name, node
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(node, f"{owner}{node.name}." if named else owner)


def lines_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    count = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        count -= node.body[0].end_lineno - node.body[0].lineno + 1
    return count


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + bool(given.vararg) + bool(given.kwarg)


def measured(folders: tuple[str, ...]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, node in functions(ast.parse(path.read_text())):
                yield f"{path.relative_to(ROOT).as_posix()} {name}", node


def modules() -> dict[str, Path]:
    found = {}
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All of them, those inside functions too; not those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from imports(node)


def arrows() -> dict[str, set[str]]:
    """Each module of the product with those that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for node in imports(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & set(known)
                continue
            assert not node.level, f"{name} imports relative to itself"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            outer = {str(node.module)} if len(inner) < len(node.names) else set()
            graph[name] |= inner | (outer & set(known))
        graph[name] -= {package for package in known if name.startswith(f"{package}.")}  # imported whatever it says
    return graph


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def allowed(module: str) -> tuple[str, ...]:
    """The packages of the product that a module may import."""
    if within(module, HARNESS):
        room = module.removeprefix(HARNESS).split(".")[1:2]
        below = ROOMS[: ROOMS.index(room[0]) + 1] if room else ()
        return (*(f"{HARNESS}.{name}" for name in below), *(() if room == ["runs"] else ("msam",)))
    if module == "experiments.__main__":
        return ("experiments",)
    if within(module, "experiments"):
        files = [path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__main__"]
        return (f"{HARNESS}.runs", *(f"experiments.{name}" for name in files))
    if within(module, "msam"):
        return ("msam",)
    return (module.split(".")[0], f"{HARNESS}.runs", *MAY_ALSO.get(module, ()))


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(arrows()).prepare()  # raises CycleError with the circle


def test_no_arrow_points_upwards():
    graph = arrows()
    assert [f"{a} -> {b}" for a, found in graph.items() for b in sorted(found) if not within(b, *allowed(a))] == []
    assert any(within(name, f"{HARNESS}.runs") for name in graph["slurm.submission"]), "arrows are seen"


def test_an_arrow_inside_a_function_counts():
    tree = ast.parse("import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    from c import d\n")
    assert [ast.unparse(node) for node in imports(tree)] == ["import a", "from c import d"]


@pytest.mark.parametrize(
    ("count", "most", "excepted"),
    [(lines_without_docstring, LINES_OF_A_FUNCTION, LONGER), (parameters, PARAMETERS, WIDER)],
    ids=["lines", "parameters"],
)
def test_a_function_can_be_read_at_once(count, most, excepted):
    over = {name: count(node) for name, node in measured(PRODUCT) if count(node) > most}
    assert set(over) == set(excepted), over


def test_a_file_can_be_read_at_once():
    counts = {path: path.read_text().count("\n") for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")}
    assert {path: count for path, count in counts.items() if count > LINES_OF_A_FILE} == {}
