"""Checks that every import inside lazyrestore goes in the direction that docs/architecture.md draws.

Usage: check_imports.py [FOLDER of the package]. Prints each wrong import as path:line; exit status 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "lazyrestore"

# Each part, and the parts it may import; every part may import itself and what is in EVERYBODY.
EVERYBODY = {"errors", "restore_plan"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "restore_plan": set(),
    "_native": set(),
    "kernel": {"_native"},
    "program": {"_native", "kernel"},
    "store": {"_native"},
    "manifest": {"resources", "program", "kernel"},
    "pager": {"_native", "kernel"},
    "resources": {"program", "kernel", "_native", "manifest"},
    "origin": {"resources", "kernel", "pager", "store"},
    "snapshot": {"stored_plan", "origin", "manifest", "program", "resources", "kernel", "store", "_native"},
    "spawn": {"_native", "kernel", "memory_files"},
    "pid_namespace": {"_native", "kernel", "memory_files", "program", "spawn"},
    "network_namespace": {"_native", "program"},
    "restore_options": set(),
    "stand_ins": set(),
    "restore_checks": {"kernel", "_native"},
    "mapped_files": {"resources", "_native"},
    "restore_program": {
        "manifest",
        "restore_options",
        "network_namespace",
        "own_pages",
        "pid_namespace",
        "resources",
        "program",
        "pager",
        "kernel",
        "_native",
    },
    "stored_plan": {"manifest", "restore_program"},
    "memory_files": {"restore_checks", "store"},
    "new_process": {"spawn", "program", "store", "kernel", "_native"},
    "own_pages": {"manifest", "program", "store", "kernel", "_native"},
    "restore": {
        "mapped_files",
        "memory_files",
        "new_process",
        "own_pages",
        "stored_plan",
        "restore_checks",
        "restore_options",
        "restore_program",
        "spawn",
        "pid_namespace",
        "manifest",
        "resources",
        "program",
        "pager",
        "store",
        "kernel",
        "_native",
    },
    "working_set": {"pager", "store"},
    "readiness": {"manifest", "store"},
    "fleet": {"manifest", "resources", "kernel"},
    "restored_process": {"restore", "pager"},
    "api": {
        "restored_process",
        "stored_plan",
        "fleet",
        "readiness",
        "restore_options",
        "snapshot",
        "restore",
        "manifest",
        "store",
        "pager",
        "kernel",
    },
    "__init__": {"api"},
    "cli": {
        "commands",
        "stand_ins",
        "working_set",
        "readiness",
        "__init__",
        "api",
        "fleet",
        "store",
        "manifest",
        "kernel",
        "snapshot",
        "restore",
        "pager",
        "program",
        "resources",
    },
    "commands": {"stand_ins", "api", "store", "pager", "resources"},
    "__main__": {"cli", "commands", "stand_ins"},
}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also those inside functions; relative names are resolved against package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def part_of(dotted: str, parts: set[str]) -> str | None:
    """The part that a dotted name belongs to; None if it is not in the package."""
    names = dotted.split(".")
    if names[0] != PACKAGE:
        return None
    return names[1] if len(names) > 1 and names[1] in parts else "__init__"


def wrong_imports(root: Path) -> Iterator[str]:
    """One line for each import that goes against the direction, and for each part that has no place in the table."""
    present = {path.stem if path.is_file() else path.name for path in root.iterdir()} | set(MAY_IMPORT)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        part = relative.parts[0].removesuffix(".py")
        if part not in MAY_IMPORT:
            yield f"{path}:1: {part} has no place in the architecture (docs/architecture.md, {Path(__file__).name})"
            continue
        package = ".".join((PACKAGE, *relative.parts[:-1]))
        for line, dotted in imported_modules(ast.parse(path.read_text(), str(path)), package):
            target = part_of(dotted, present)
            if target is not None and target != part and target not in MAY_IMPORT[part] | EVERYBODY:
                yield f"{path}:{line}: {part} may not import {target}"


def main() -> int:
    wrong = list(wrong_imports(Path(sys.argv[1] if len(sys.argv) > 1 else PACKAGE)))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
