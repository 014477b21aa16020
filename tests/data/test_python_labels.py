"""Python source as annotated text: every label is where `ast` says the construct is."""

import ast
import logging

import pytest

from sae_lens_route.data.demo_corpus import source_files, split_of
from sae_lens_route.data.python_labels import annotated_sources, python_documents

SOURCE = '''\
"""The module's text."""
import os.path as p
from json import loads

@cached(size=2)
class Reader(Base):
    größe: "int" = é.größe  # in übrig words

    def read(self, *paths, n=max(1, 2)) -> str:
        r"""Reads\\n it."""
        try:
            return [self.open(path) for path in paths if path]
        except OSError as error:
            raise Failure("no " + f"{self.n!r} {'x'}") from error
        finally:
            close()
'''


def annotated(source):
    (document,) = annotated_sources([("source", source)])
    return document


def spans_with(document, concept):
    """Texts of the spans that carry a concept, in order."""
    return [
        document.text[start:end]
        for start, end, concepts in document.spans
        if concept in {found.name for found in concepts}
    ]


@pytest.mark.parametrize(
    ("concept", "expected"),
    [
        ("keyword=from", "from from"),
        (
            "kind=keyword",
            "import as from import class def try return for in if except as raise from finally",
        ),
        ("kind=number", "2 1 2"),
        ("operator=->", "->"),
        ("name=self", "self self"),
        ("kind=comment", "# in übrig words"),
        ("word=words", "words"),
        ("role=class definition", "Reader"),
        ("role=function definition", "read"),
        ("role=base class", "Base"),
        ("role=decorator", "cached"),
        ("role=parameter", "self paths n"),
        ("role=keyword argument", "size"),
        ("role=imported name", "os p loads"),
        ("role=attribute", "größe open"),
        ("role=assigned name", "größe path"),
        ("role=callee", "cached max open Failure close"),
        ("in=import", "import os . path as p from json import loads"),
        ("in=docstring", '" " " The module \' s text . " " " r " " " Reads \\n it . " " "'),
        ("in=annotation", '" int " str'),
        ("in=default argument", "max ( 1 , 2 )"),
        ("in=decorator", "cached ( size = 2 )"),
        ("in=comprehension", "[ self . open ( path ) for path in paths if path ]"),
        ("in=return", "return [ self . open ( path ) for path in paths if path ]"),
        ("in=f-string", "f \" { self . n ! r } { ' x ' } \""),
        ("in=finally", "close ( )"),
    ],
)
def test_every_construct_is_labelled_where_it_is(concept, expected):
    assert spans_with(annotated(SOURCE), concept) == expected.split()


def test_contexts_are_nested():
    document = annotated(SOURCE)
    inside = [
        {concept.name for concept in concepts if concept.level == "context"}
        for start, end, concepts in document.spans
        if document.text[start:end] in ("Failure", "x")
    ]
    assert inside == [{"in=except", "in=raise"}, {"in=except", "in=raise", "in=f-string"}]


def test_what_is_in_a_string_has_no_part_in_the_syntax():
    document = annotated(SOURCE)
    for _, _, concepts in document.spans:
        names, levels = {c.name for c in concepts}, {c.level for c in concepts}
        assert "kind=string" not in names or "syntax" not in levels
        assert "word=f" not in names, "the prefix of a string is no word"


def test_contexts_within_an_f_string_are_left_out():
    """Before Python 3.12 the syntax tree has no correct places for them."""
    document = annotated('x = (f"a" f"""\n{[a for a in b]}""")\ny = [\n1, 2]\n')
    assert spans_with(document, "in=comprehension") == []
    assert "for" in spans_with(document, "in=f-string")


def test_spans_are_in_order_and_cover_all_but_white_space():
    document = annotated(SOURCE)
    end = 0
    for span in document.spans:
        assert not document.text[end : span.start].strip() and span.start < span.end
        end = span.end
    assert not document.text[end:].strip()


def test_ends_of_lines_are_read_as_python_reads_them():
    expected = annotated(SOURCE)
    for newline in ("\r\n", "\r"):
        assert annotated(SOURCE.replace("\n", newline)) == expected
    with_form_feed = annotated("a = 1\n\x0c\nb = '\x0c'; c.d\n")
    assert spans_with(with_form_feed, "role=assigned name") == ["a", "b"]
    assert spans_with(with_form_feed, "role=attribute") == ["d"]


def test_what_does_not_parse_is_left_out_and_counted(caplog):
    sources = [("bad.py", "print 'x'"), ("good.py", "x = 1"), ("null.py", "x = '\0'")]
    with caplog.at_level(logging.WARNING, logger="sae_lens"):
        documents = annotated_sources(sources)
    assert [document.name for document in documents] == ["good.py"]
    assert "2 of 3 texts left out, because this Python cannot parse them: bad.py, null.py" in (
        caplog.text
    )


@pytest.fixture(scope="module")
def library():
    return python_documents("heldout", max_characters=100_000)


def test_the_library_has_as_many_labels_as_its_syntax_trees_have_nodes(library):
    assert 50_000 < sum(len(document.text) for document in library) <= 100_000
    for document in library:
        nodes = list(outside_f_strings(ast.parse(document.text)))
        expected = {
            "role=function definition": (ast.FunctionDef, ast.AsyncFunctionDef),
            "role=class definition": ast.ClassDef,
            "role=parameter": ast.arg,
            "role=attribute": ast.Attribute,
        }
        for concept, types in expected.items():
            n = sum(isinstance(node, types) for node in nodes)
            assert len(spans_with(document, concept)) == n, (document.name, concept)
        names = sorted(n.id for n in nodes if isinstance(n, ast.Name) and stored(n))
        assert sorted(spans_with(document, "role=assigned name")) == names


def outside_f_strings(node):
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from outside_f_strings(child)


def stored(name):
    return isinstance(name.ctx, ast.Store)


def test_the_demo_corpus_gives_the_same_documents_every_time(library):
    assert library == python_documents("heldout", max_characters=100_000)
    files = {path: (module, text) for path, module, text in source_files()}
    assert len({document.name for document in library}) == len(library) > 3
    for document in library:
        module, text = files[document.name]
        assert split_of(module) == "heldout" and text == document.text
