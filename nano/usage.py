"""Answers `python STAGE.py --help` from the text of the stage itself, before torch is loaded: that
alone takes seconds. A stage imports this first. The comments beside the fields are the help."""

import ast
import re
import sys
from pathlib import Path


def usage(script: Path) -> str:
    """The docstring of a stage, its flags with defaults and comments, and its recipes."""
    source = script.read_text(encoding="utf-8")
    tree, lines, out = ast.parse(source), source.splitlines(), []
    config = next(node for node in tree.body if getattr(node, "name", "") == "Config")
    first = next(node.lineno for node in config.body if isinstance(node, ast.AnnAssign))
    for line in lines[first - 2 : config.end_lineno]:
        if field := re.fullmatch(r"    (\w+): .+? = (.*?)(?:  # (.*))?", line):
            name, default, meaning = field.groups()
            out.append(f"  --{name} {default}".ljust(30) + f" {meaning or ''}".rstrip())
        elif line.startswith("    # "):
            out.append(line[4:])
    recipes = [node.value.keys for node in tree.body if is_assigned(node, "RECIPES")]
    names = ", ".join(key.value for keys in recipes for key in keys if key)
    head = "flags and their defaults; --no_FLAG turns one off whose default is True:"
    return "\n".join([ast.get_docstring(tree), "", f"--recipe: {names}", "", head, *out])


def is_assigned(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name


if {"--help", "-h"} & set(sys.argv[1:2]) and hasattr(sys.modules["__main__"], "__file__"):
    stage = Path(sys.modules["__main__"].__file__)
    if stage.parent == Path(__file__).parents[1]:
        print(usage(stage))
        sys.exit()
