"""Python source as annotated text: `tokenize` and `ast` know every token's part exactly.

Names, keywords, operators and numbers are spans; strings and comments are divided into words. The
levels and concepts of a span:

- token: its text, as `keyword=if`, `operator=(`, `name=self`, or `word=the` in strings and comments
- kind: `kind=keyword`, `operator`, `name`, `number`, `string` or `comment`
- syntax: the part of a name, such as `role=parameter` or `role=callee`; a name can have several
- context: every construct that a span is inside, such as `in=docstring` or `in=except`
"""

from __future__ import annotations

import ast
import io
import keyword
import random
import re
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from sae_lens import logger

from sae_lens_route.data.annotations import AnnotatedDocument, Concept, Span
from sae_lens_route.data.demo_corpus import Split, source_files, split_of

_CONTEXT_OF_NODE = {
    ast.ListComp: "comprehension",
    ast.SetComp: "comprehension",
    ast.DictComp: "comprehension",
    ast.GeneratorExp: "comprehension",
    ast.AsyncFor: "for",
    ast.AsyncWith: "with",
    ast.ExceptHandler: "except",
    ast.For: "for",
    ast.Import: "import",
    ast.ImportFrom: "import",
    ast.Lambda: "lambda",
    ast.Raise: "raise",
    ast.Return: "return",
    ast.While: "while",
    ast.With: "with",
}
_CONTEXT_OF_FIELD = {
    "annotation": "annotation",
    "decorator_list": "decorator",
    "defaults": "default argument",
    "finalbody": "finally",
    "kw_defaults": "default argument",
    "returns": "annotation",
    "slice": "subscript",
    "test": "condition",
}
"""Contexts that are fields of nodes, in whatever node the field is."""
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITION_AFTER = {"class": "class definition", "def": "function definition"}
_KINDS = {
    "COMMENT": "comment",
    "NAME": "name",
    "NUMBER": "number",
    "OP": "operator",
    "STRING": "string",
}
# an escape sequence, a word or another character
_WORD = re.compile(r"\\.|\w+|[^\w\s]", re.DOTALL)
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)
"""What `ast` and `tokenize` raise about text that is not Python."""


def python_documents(
    split: Split = "heldout", *, tests: bool = False, max_characters: int | None = None
) -> tuple[AnnotatedDocument, ...]:
    """The source files of one side of the demo corpus, annotated, in a fixed shuffled order.

    Args:
        split: "train" or "heldout".
        tests: Whether to add the standard library's tests.
        max_characters: Text in all; a file that would exceed it is left out.
    """
    files = [
        (path, text)
        for path, module, text in source_files(tests=tests)
        if split_of(module) == split
    ]
    random.Random(0).shuffle(files)
    chosen, length = [], 0
    for path, text in files:
        if max_characters is None or length + len(text) <= max_characters:
            chosen.append((path, text))
            length += len(text)
    return annotated_sources(chosen)


def annotated_sources(sources: Iterable[tuple[str, str]]) -> tuple[AnnotatedDocument, ...]:
    """Annotate Python source; what does not parse is left out, and a warning says how much.

    Args:
        sources: Names and texts.

    Returns:
        Documents with "\\n" for every end of a line.
    """
    documents: list[AnnotatedDocument] = []
    unreadable: list[str] = []
    for name, text in sources:
        text = re.sub(r"\r\n?", "\n", text)
        try:
            tree, tokens = _parsed(text)
        except _UNREADABLE:
            unreadable.append(name)
        else:
            documents.append(AnnotatedDocument(name, text, tuple(_spans(text, tree, tokens))))
    if unreadable:
        logger.warning(
            f"{len(unreadable)} of {len(unreadable) + len(documents)} texts left out, because this "
            f"Python cannot parse them: {', '.join(unreadable[:5])}"
            + (" ..." if len(unreadable) > 5 else "")
        )
    return tuple(documents)


class _Piece(NamedTuple):
    """A token of Python, or a word of a string or comment."""

    start: int
    end: int
    concepts: list[Concept]


def _parsed(text: str) -> tuple[ast.Module, list[tokenize.TokenInfo]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences
        tree = ast.parse(text)
    return tree, list(tokenize.generate_tokens(io.StringIO(text).readline))


def _spans(text: str, tree: ast.Module, tokens: Iterable[tokenize.TokenInfo]) -> Iterator[Span]:
    structure = _Structure(text, tree)
    pieces = list(_pieces(text, tokens, structure))
    starts = np.array([piece.start for piece in pieces])
    for name, intervals in sorted(structure.contexts.items()):
        first, after = np.sort(np.array(intervals), axis=0).T
        # intervals that started minus intervals that ended
        depth = np.searchsorted(first, starts, "right") - np.searchsorted(after, starts, "right")
        for i in np.flatnonzero(depth):
            pieces[i].concepts.append(Concept(f"in={name}", "context"))
    return (Span(start, end, tuple(concepts)) for start, end, concepts in pieces)


def _pieces(
    text: str, tokens: Iterable[tokenize.TokenInfo], structure: _Structure
) -> Iterator[_Piece]:
    before = ""
    for kind, start, end in _places(tokens, structure.line_starts):
        token = text[start:end]
        if kind in ("string", "comment"):
            shared = [Concept(f"kind={kind}", "kind")]
            prefix = re.match(r"\w*", token)
            if prefix and "f" in prefix[0].lower():
                shared.append(Concept("in=f-string", "context"))
            for match in _WORD.finditer(token):
                is_word = match[0][0].isalpha() and match.start() > 0  # not the prefix
                word = [Concept(f"word={match[0].lower()}", "token")] if is_word else []
                concepts = [*word, *shared]
                yield _Piece(start + match.start(), start + match.end(), concepts)
        else:
            kind = "keyword" if keyword.iskeyword(token) else kind
            concepts = [Concept(f"kind={kind}", "kind")]
            if kind != "number":
                concepts.insert(0, Concept(f"{kind}={token}", "token"))
            if kind == "name":
                roles = structure.roles_at_start[start] | structure.roles_at_end[end]
                roles |= {_DEFINITION_AFTER[before]} if before in _DEFINITION_AFTER else set()
                concepts += [Concept(f"role={role}", "syntax") for role in sorted(roles)]
            yield _Piece(start, end, concepts)
        before = token


def _places(
    tokens: Iterable[tokenize.TokenInfo], line_starts: list[int]
) -> Iterator[tuple[str, int, int]]:
    """Kind, first character and end of the tokens that have a text; an f-string is one of them."""
    depth, begin = 0, 0
    for token in tokens:
        start, end = (line_starts[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):  # since Python 3.12, with the tokens inside
            begin = begin if depth else start
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if not depth:
                yield "string", begin, end
        elif name in _KINDS and not depth:
            yield _KINDS[name], start, end


class _Structure:
    """What the syntax tree says about places in the text, counted in characters."""

    def __init__(self, text: str, tree: ast.Module) -> None:
        self._lines = text.split("\n")
        self.line_starts = list(accumulate((len(line) + 1 for line in self._lines), initial=0))
        self.roles_at_start: defaultdict[int, set[str]] = defaultdict(set)
        """Roles of the names that start at a character, for nodes that start with the name."""
        self.roles_at_end: defaultdict[int, set[str]] = defaultdict(set)
        """Roles of the names that end before a character, for nodes that end with the name."""
        self.contexts: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        nodes: list[ast.AST] = [tree]
        while nodes:
            node = nodes.pop()
            self._add_roles(node)
            self._add_contexts(node)
            # before Python 3.12, nodes in an f-string have no correct places
            if not isinstance(node, ast.JoinedStr):
                nodes += ast.iter_child_nodes(node)

    def _interval(self, node: Any) -> tuple[int, int]:
        return (
            self._place(node.lineno, node.col_offset),
            self._place(node.end_lineno, node.end_col_offset),
        )

    def _place(self, row: int, n_bytes: int) -> int:
        line = self._lines[row - 1]
        column = n_bytes if line.isascii() else len(line.encode()[:n_bytes].decode())
        return self.line_starts[row - 1] + column

    def _add_roles(self, node: ast.AST) -> None:
        starts, ends = self.roles_at_start, self.roles_at_end
        match node:
            case ast.arg():
                starts[self._interval(node)[0]].add("parameter")
            case ast.keyword(arg=str()):
                starts[self._interval(node)[0]].add("keyword argument")
            case ast.alias():
                starts[self._interval(node)[0]].add("imported name")
                ends[self._interval(node)[1]].add("imported name")
            case ast.Attribute():
                ends[self._interval(node)[1]].add("attribute")
            case ast.Name(ctx=ast.Store()):
                ends[self._interval(node)[1]].add("assigned name")
            case ast.Call():
                ends[self._interval(node.func)[1]].add("callee")
            case ast.ClassDef():
                for base in node.bases:
                    ends[self._interval(base)[1]].add("base class")
        for decorator in getattr(node, "decorator_list", ()):
            name = decorator.func if isinstance(decorator, ast.Call) else decorator
            ends[self._interval(name)[1]].add("decorator")

    def _add_contexts(self, node: ast.AST) -> None:
        if name := _CONTEXT_OF_NODE.get(type(node)):
            self.contexts[name].append(self._interval(node))
        for field, value in ast.iter_fields(node):
            if name := _CONTEXT_OF_FIELD.get(field):
                for child in value if isinstance(value, list) else [value]:
                    if child is not None:
                        self.contexts[name].append(self._interval(child))
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            self.contexts["docstring"].append(self._interval(node.body[0]))
