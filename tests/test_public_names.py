"""The names that `sae_lens_route` exports."""

import ast
import importlib
from pathlib import Path

import pytest

import sae_lens_route


def test_every_exported_name_is_there_and_comes_from_this_package():
    for name in sae_lens_route.__all__:
        assert getattr(sae_lens_route, name).__module__.startswith("sae_lens_route."), name
    assert set(sae_lens_route.__all__) <= set(dir(sae_lens_route))


def test_a_star_import_binds_them_all():
    names: dict[str, object] = {}
    exec("from sae_lens_route import *", names)
    assert set(sae_lens_route.__all__) <= names.keys()


def test_type_checkers_and_the_interpreter_see_the_same_objects():
    tree = ast.parse(Path(sae_lens_route.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared.keys() == set(sae_lens_route.__all__)
    for name, module in declared.items():
        assert getattr(importlib.import_module(module), name) is getattr(sae_lens_route, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'RouteSae'"):
        sae_lens_route.RouteSae  # noqa: B018
    with pytest.raises(ImportError):
        exec("from sae_lens_route import RouteSae")
