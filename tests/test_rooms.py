"""The house: rooms of `recipelib` import only from rooms above them, by public names; recipes are
read in five minutes.
"""

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
LIBRARY = RECIPES / "recipelib"
# From the bottom up; a room may import from those before it.
ROOMS = [
    *("runtime", "prompts", "data", "encoding", "models", "adapters", "inference", "evaluation"),
    *("probes", "activations"),
    *("task", "training", "planning", "pipeline", "reporting", "cli"),
]
SCRIPTS = sorted(RECIPES.glob("*.py"))
FILES = sorted(LIBRARY.rglob("*.py"))
# The bottleneck adapter is copied as one file.
COPIED = LIBRARY / "adapters" / "bottleneck.py"


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file takes from recipelib, anywhere in it; the name is
    empty where the module itself is imported.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(name.name, "") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for name in node.names:
                module = f"{node.module}.{name.name}"
                inside = RECIPES / Path(*module.split("."))
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                found.append((module, "") if is_module else (node.module, name.name))
    return [(module, name) for module, name in found if module.split(".")[0] == "recipelib"]


def public_names(room: str) -> set[str]:
    init = LIBRARY / room / "__init__.py"
    tree = ast.parse((init if init.exists() else LIBRARY / f"{room}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return {node.name for node in tree.body if hasattr(node, "name")}


def test_every_file_is_in_a_room_of_the_list():
    found = {
        path.stem for path in LIBRARY.iterdir() if path.name not in ("__init__.py", "__pycache__")
    }
    assert found == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIBRARY)))
def test_a_room_imports_only_from_those_before_it_and_only_what_is_public(file):
    own = file.relative_to(LIBRARY).parts[0].removesuffix(".py")
    for module, name in imports(file):
        assert module != "recipelib", f"{file}: the whole of recipelib"
        room = room_of(module)
        if room == own:
            continue
        assert ROOMS.index(room) < ROOMS.index(own), f"{file.name} imports upward: {module}"
        assert module.count(".") == 1, f"{file.name}: {module} is private to {room}"
        assert not name or name in public_names(room), f"{file.name}: {room}.{name} is private"


def test_no_file_of_a_room_imports_in_a_circle():
    graph = {}
    for file in FILES:
        if file.name == "__init__.py":
            continue
        name = ".".join(file.relative_to(RECIPES).with_suffix("").parts)
        graph[name] = {module for module, _ in imports(file) if module.count(".") == 2}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) >= len(graph)


def test_what_is_copied_by_itself_imports_nothing_of_ours():
    assert imports(COPIED) == []


@pytest.mark.parametrize("room", [room for room in ROOMS if (LIBRARY / room).is_dir()])
def test_a_room_says_what_it_is_and_exports_what_others_use(room):
    tree = ast.parse((LIBRARY / room / "__init__.py").read_text(encoding="utf-8"))
    assert len(ast.get_docstring(tree).splitlines()) == 1
    exported = {
        name.asname or name.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert exported == public_names(room)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_recipes_take_public_names_only(script):
    for module, name in imports(script):
        assert module.count(".") == 1, f"{module} is private to its room"
        assert not name or name in public_names(room_of(module))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_a_recipe_is_read_in_five_minutes(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    (main,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == "main"]
    assert main.end_lineno - main.lineno + 1 <= 50
