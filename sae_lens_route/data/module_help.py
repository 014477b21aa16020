"""Prints the help pages of the standard library's C modules; `demo_corpus.py` runs this file.

It runs in a bare interpreter, where nothing but the standard library can be imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import pydoc
import re
import sys


def pages() -> list[tuple[str, str]]:
    """Name and help page of each module, sorted by name."""
    extension = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    found = []
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_", "xx")):
            continue
        try:
            spec = importlib.util.find_spec(name)
            if spec and (spec.origin == "built-in" or str(spec.origin).endswith(extension)):
                page = pydoc.plain(pydoc.render_doc(name))
                # the sections after these headings differ between machines (sys.path, file names)
                found.append((name, re.split(r"\n(?:DATA|FILE)\n", page)[0]))
        except (ImportError, pydoc.ErrorDuringImport):
            continue
    return found


if __name__ == "__main__":
    print(json.dumps(pages()))
