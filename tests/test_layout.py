"""The house rules that CONTRIBUTING states: sizes of files, functions and classes; no cycles."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import vitrim

SOURCE = Path(vitrim.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def length(node: Function | ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def test_files_are_short() -> None:
    assert len(FILES) > 100
    assert [path for path in FILES if path.read_text().count("\n") > 400] == []


def test_functions_are_short() -> None:
    lengths = {
        place: length(node) for place, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {place: lines for place, lines in lengths.items() if lines > 60} == {}
    assert statistics.median(lengths.values()) <= 10


def test_classes_are_small() -> None:
    for place, node in nodes(ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, Function)]
        assert len(methods) <= 12, place
        assert length(node) <= 200, place
        for method in methods:
            if method.name == "__init__":
                arguments = [*method.args.args, *method.args.kwonlyargs]
                assert len(arguments) - 1 <= 9, place


def test_types_are_said() -> None:
    uses = sum(len(re.findall(r"\bAny\b", path.read_text())) for path in FILES)
    assert uses <= 150


def test_pipeline_is_a_screen() -> None:
    tree = ast.parse((SOURCE / "pipeline.py").read_text())
    lengths = {node.name: length(node) for node in tree.body if isinstance(node, Function)}
    assert lengths.pop("run") <= 45
    assert max(lengths.values()) <= 25


def test_rooms_say_what_they_are_for() -> None:
    rooms = [path for path in SOURCE.iterdir() if (path / "__init__.py").is_file()]
    assert len(rooms) + len(list(SOURCE.glob("*.py"))) <= 24
    for room in rooms:
        doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert doc is not None, room
        assert "ay import" in doc or room.name == "conf", room


def test_layers_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
