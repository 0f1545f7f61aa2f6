"""The shape of the house: imports go down only, and every public name is documented."""

import ast
import pathlib

import jaxdiff

ROOT = pathlib.Path(jaxdiff.__file__).parent

# Room -> the rooms it may import. Rooms of the lowest floor do not import each other; files.py, config.py
# and progress.py stand below all.
GROUND = {"config", "files", "host_memory", "progress"}
LOWEST = {"diffusion", "models", "data", "weights"}
ALLOWED = {
    "config": set(),
    "files": set(),
    "host_memory": set(),
    "progress": set(),
    "diffusion": GROUND,
    "models": GROUND,
    "data": GROUND,
    "weights": GROUND,
    "losses": GROUND | {"diffusion"},
    "evaluation": GROUND | LOWEST,
    "training": GROUND | LOWEST | {"losses", "evaluation"},
    "generation": GROUND | LOWEST | {"losses", "evaluation"},
    "tasks": GROUND | LOWEST | {"losses", "evaluation", "training", "generation"},
    "command_line": GROUND | {"tasks", "training", "evaluation"},
    "encode": GROUND | {"tasks", "command_line"},
    "__main__": GROUND | LOWEST | {"tasks", "command_line"},  # of a room: a command that stands above all
    "export": GROUND | {"generation", "training", "tasks", "command_line"},
}


def room(path):
    if path.name == "__main__.py":
        return "__main__"
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms of jaxdiff that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("jaxdiff."):
                yield name.split(".")[1]


def test_imports_go_down_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in ROOT.rglob("*.py")
        if path != ROOT / "__init__.py"
        for other in imported_rooms(path)
        if other != room(path) and other not in ALLOWED[room(path)]
    ]
    assert not wrong


def test_training_knows_no_task():
    assert all("tasks" not in imported_rooms(path) for path in (ROOT / "training").glob("*.py"))


def test_commands_are_short():
    for name in ("train.py", "sample.py", "evaluate.py"):
        assert len((ROOT.parent / name).read_text().splitlines()) < 120


def test_public_names_are_listed_and_documented():
    for name in jaxdiff.__all__:
        assert name in jaxdiff.__doc__, f"{name} is missing in the package's docstring"
        assert getattr(jaxdiff, name).__doc__
