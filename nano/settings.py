"""A stage's settings: a dataclass, recipes that are dicts of its fields, and the command line,
which has the last word. A stage imports this before torch, so that --help is answered at once, from
the text of the stage: the comments beside the fields are the help.
"""

import argparse
import ast
import dataclasses
import difflib
import os
import re
import signal
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

debug = False  # --debug: errors that a person can mend keep their traceback


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ' (did you mean X?)' for the most similar choice, or ''."""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


@contextmanager
def for_people():
    """What is wrong with the user's flags or files ends the run with one line, not a traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        if debug:
            raise
        file = getattr(error, "filename", None)  # The system's own error, else our sentence.
        raise SystemExit(f"error: {f'{file}: {error.strerror}' if file else error}") from error


DISK = {
    "No space left on device": "the disk is full",
    "Disk quota exceeded": "the quota of the disk is used up",
    "File too large": "a file would become larger than this system allows",
    "Read-only file system": "it cannot be written to; choose another --out",
    "Permission denied": "this user may not write or read there; choose another --out",
    "Input/output error": "the disk fails",
}


def disk_trouble(error: BaseException) -> str:
    """One line about a full, failing or read-only disk, or ''. Libraries wrap the system's error,
    and its words alone survive."""
    lines = [] if isinstance(error, SystemExit) else str(error).splitlines()
    if isinstance(error, OSError) and error.errno:
        lines.append(f"{os.strerror(error.errno)}: {error}")
    found = [(line.strip(), DISK[words]) for words in DISK for line in lines if words in line]
    again = "When that is mended, the same command goes on from what was last saved."
    return f"error: {found[0][1]} ({found[0][0][-300:]}). {again}" if found else ""


def moved(commands: dict[str, str]):
    """Ends the program with the new name when it is called with a sub-command of an old version."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in commands:
        print(f"{word!r} is a tool of its own now: {commands[word]}", file=sys.stderr)
        raise SystemExit(2)


def comments(script: Path) -> list[tuple[str, str, str]]:
    """The fields of a stage's Config as (name, default, comment). What heads a group of them, or
    goes on above a field, has no name."""
    source, found = script.read_text(encoding="utf-8"), []
    body = ast.parse(source).body
    config = next(node for node in body if getattr(node, "name", "") == "Config")
    first = next(node.lineno for node in config.body if isinstance(node, ast.AnnAssign))
    for line in source.splitlines()[first - 2 : config.end_lineno]:
        if field := re.fullmatch(r"    (\w+): .+? = (.*?)(?:  # (.*))?", line):
            found.append((field[1], field[2], field[3] or ""))
        elif line.startswith("    # "):
            found.append(("", "", line[6:]))
    return found


def usage(script: Path) -> str:
    """The docstring of a stage, its recipes, and its flags with defaults and comments."""
    tree, lines = ast.parse(script.read_text(encoding="utf-8")), []
    for name, default, comment in comments(script):
        default = re.sub(r".+\((\w+)\)$", r"\1", default)  # f(STAGES): the name says enough.
        lines.append(f"  --{name} {default}".ljust(30) + f" {comment}" if name else f"  {comment}")
    recipes = [node.value.keys for node in tree.body if is_assigned(node, "RECIPES")]
    names = ", ".join(key.value for keys in recipes for key in keys if key)
    head = "flags and their defaults; --no_FLAG turns one off whose default is True, --debug shows"
    head += " the traceback of an error:"
    return "\n".join([ast.get_docstring(tree), "", f"--recipe: {names}", "", head, *lines])


def is_assigned(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name


def truth(word: str) -> bool:
    if word.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word.lower() in ("true", "1", "yes")


def make_parser(config_class) -> argparse.ArgumentParser:
    """A flag for each field of the dataclass."""
    about = dict(usage="%(prog)s [--FLAG VALUE ...]   (--help lists them)", add_help=False)
    parser = argparse.ArgumentParser(**about, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true")
    for field in dataclasses.fields(config_class):
        options = dict(type=field.type)
        if field.type is bool:
            options = dict(type=truth, nargs="?", const=True)
        elif choices := get_args(field.type):  # Literal
            options = dict(type=type(choices[0]), choices=choices)
        parser.add_argument(f"--{field.name}", default=field.default, **options)
    return parser


def spelled(argv: list[str], config_class) -> list[str]:
    """--max-len as --max_len, --no_resume as --resume=False."""
    switches = {f"--no_{f.name}" for f in dataclasses.fields(config_class) if f.type is bool}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name[:2] == "--" else name
        words.append(f"--{name[5:]}=False" if name in switches else name + equals + value)
    return words


def parse_config(config_class, recipes: dict[str, dict], argv: list[str] | None = None):
    """Reads the command line: the dataclass's defaults < the recipe < the flags.

    The dataclass holds the paper's values. Without --recipe the toy's recipe is taken, unless
    --model, --data or --bench name something of one's own: then the paper's values hold.
    An unknown name ends the program and is answered with the nearest one.
    """
    global debug
    argv = spelled(sys.argv[1:] if argv is None else argv, config_class)
    script = Path(sys.modules[config_class.__module__].__file__)
    if {"--help", "-h"} & set(argv):
        print(usage(script))
        raise SystemExit(0)
    parser, given = make_parser(config_class), {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        given[name] = value if equals else "".join(argv[i + 1 : i + 2])
    own = [given[f] for f in ("--model", "--data", "--bench") if f in given]
    default = "" if any(not value.startswith("toy:") for value in own) else "toy"
    recipe = given.get("--recipe", default)
    if recipe and recipe not in recipes:
        known = ", ".join(recipes)
        parser.error(f"unknown recipe {recipe!r}{nearest(recipe, recipes)}; there are: {known}")
    chosen = recipes[recipe] if recipe else {}
    fields = [field.name for field in dataclasses.fields(config_class)]
    wrong = set(chosen) - set(fields)
    assert not wrong, f"recipe {recipe} sets fields that do not exist: {wrong}"
    parser.set_defaults(**{**chosen, "recipe": recipe})
    values, rest = parser.parse_known_args(argv)
    if rest:
        flag = rest[0].split("=")[0]
        known = {f"--{name}": name for name in fields} | said_of_fields(script)
        close = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        hint = f" (did you mean --{known[close[0]]}?)" if close else ""
        parser.error(f"unknown argument {flag!r}{hint}")
    debug = values.debug
    return config_class(**{name: getattr(values, name) for name in fields})


def said_of_fields(script: Path) -> dict[str, str]:
    """The first words of each comment as if they were a flag: --learning_rate leads to lr."""
    said = {name: re.split(r"[.,;:(]", text)[0].strip() for name, _, text in comments(script)}
    return {"--" + words.replace(" ", "_"): name for name, words in said.items() if name and words}


main = Path(getattr(sys.modules["__main__"], "__file__", "") or "")
if {"--help", "-h"} & set(sys.argv[1:]) and main.parent == Path(__file__).parents[1]:
    if main.stem in ("cold_start", "sft", "grpo", "eval"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback.
        print(usage(main))
        sys.exit()
