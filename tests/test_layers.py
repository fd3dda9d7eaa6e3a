"""Data flows one way: a folder imports only from those above it."""

import ast
import pathlib

import pytest

import hybrid_jax

ROOT = pathlib.Path(hybrid_jax.__file__).parent
CORE_ONLY = {"cost", "pruning", "quantization", "experts"}
ORDER = [
    "core",
    "program",
    *sorted(CORE_ONLY),
    "models",
    "data",
    "training",
    "deploy",
    "report",
    "recipes",
    "contrib",
]


def imported(file: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {p[1] for p in parts if p[0] == "hybrid_jax" and len(p) > 1}


def test_every_folder_has_its_place():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ORDER)


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_only_from_those_above(folder):
    above = {"core", "program"} if folder in CORE_ONLY else set(ORDER[: ORDER.index(folder)])
    for file in (ROOT / folder).rglob("*.py"):
        wrong = imported(file) - above - {folder}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_nothing_imports_contrib():
    for file in (*ROOT.rglob("*.py"), *ROOT.parent.glob("launch/**/*.py")):
        assert "contrib" not in imported(file) or file.parent == ROOT / "contrib", file


def docstrings_and_code(file: pathlib.Path) -> tuple[int, int]:
    """Lines of docstring, and of code without imports, comments and blank lines."""
    source = file.read_text()
    spans = {True: set(), False: set()}
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            spans[text] |= set(range(node.lineno, node.end_lineno + 1))
    written = {
        i
        for i, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    return len(spans[True]), len(written - spans[True] - spans[False])


@pytest.mark.parametrize("folder", ORDER)
def test_no_folder_has_more_docstring_than_code(folder):
    docstrings, code = map(sum, zip(*map(docstrings_and_code, (ROOT / folder).rglob("*.py"))))
    assert docstrings < code


def test_one_file_reads_what_depends_on_the_version_of_jax():
    # Modules that jax does not document, and parameters of equations that hold jaxprs.
    private = ("jax._src", "jax.interpreters", "_nconsts", "num_consts", "num_carry", "call_jaxpr")
    for file in ROOT.rglob("*.py"):
        read = [word for word in private if word in file.read_text()]
        assert not read or file.name == "versions.py", f"{file.relative_to(ROOT)} reads {read}"
