"""The demo corpus: text that every Python user already has.

Source and docstrings of the standard library, the help pages of its C modules and the language
reference (`pydoc_data.topics`), split *by module*: every file of a module, its tests included,
falls on the same side, so held-out text is never a near copy of training text.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from sae_lens_route.errors import UserError

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_MIN_CHARACTERS = 200


def split_of(module: str) -> Split:
    """The side of the split a module is on: one module in ten, by a hash of its name, is held out.

    `_json`, `test_json` and `json` are one module, as are `_pydecimal` and `decimal`.
    """
    name = module.removeprefix("test_").removeprefix("_py").lstrip("_")
    return "heldout" if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else "train"


@cache
def documents(split: Split, *, tests: bool = False) -> tuple[str, ...]:
    """The documents of one side of the split, in a fixed shuffled order.

    Args:
        split: "train" or "heldout".
        tests: Whether to add the standard library's tests, which some distributions leave out.

    Raises:
        UserError: the interpreter ships no library source (a zipped or stripped Python).
    """
    sources = ((module, text) for _, module, text in source_files(tests=tests))
    texts = [
        text
        for module, text in (*sources, *_reference_topics(), *_c_module_help())
        if split_of(module) == split and len(text) >= _MIN_CHARACTERS
    ]
    if not texts:
        raise UserError(
            f"no standard library source in {sysconfig.get_path('stdlib')!r}: this Python was "
            "installed without it; set dataset_path to another dataset than 'demo'"
        )
    random.Random(0).shuffle(texts)
    return tuple(texts)


def source_files(*, tests: bool = False) -> Iterator[tuple[str, str, str]]:
    """Path below the library's folder, module and text of each source file, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        in_tests = bool(_TEST_FOLDERS.intersection(parts[:-1]))
        generated = path.name.startswith(("_sysconfigdata", "config-"))
        if _SKIPPED_FOLDERS.intersection(parts) or generated or (in_tests and not tests):
            continue
        top, *below = parts
        module = below[0] if top == "test" and below else top
        try:
            with tokenize.open(path) as file:
                yield "/".join(parts), module.removesuffix(".py"), file.read()
        except (SyntaxError, UnicodeDecodeError):  # files that test the decoder
            continue


def _reference_topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from sorted(topics.items())


def _c_module_help() -> Iterator[tuple[str, str]]:
    """Help pages of the modules without source.

    Rendered by an interpreter of its own: pydoc shows what the modules are at the time, so pages
    depend on what has been imported (subclasses, functions that a debugger or pytest replaces).
    """
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("module_help.py"))]
    try:
        done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"the demo corpus cannot be made, because {sys.executable!r} does not run "
            f"({type(error).__name__}); set dataset_path to another dataset than 'demo'"
        ) from error
    yield from json.loads(done.stdout)
