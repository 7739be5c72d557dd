"""The architecture as `CONTRIBUTING.md` tells it: every module is in a room, and imports none of a later one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lexigram"


def rooms() -> dict[str, int]:
    """The number of the room of every module or subpackage, in the order of the table."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| room ")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`([a-z_]+)/?`", row)}


def imports(file: Path) -> Iterator[str]:
    """The rooms' members that a module imports, at its top or inside of functions, for types alone or not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if names == ["lexigram"] and isinstance(node, ast.ImportFrom):
            names = [f"lexigram.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("lexigram."))


def test_every_module_has_its_room_and_imports_none_behind_it() -> None:
    number = rooms()
    members = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    assert members - {"__init__", "__main__"} == set(number)
    for name in sorted(number):
        files = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
        found = {imported for file in files for imported in imports(file)} - {name}
        behind = {other for other in found if number[other] > number[name]}
        assert not behind, f"{name} imports {', '.join(sorted(behind))}, which stands after it"
