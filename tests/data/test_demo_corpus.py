"""The demo corpus: split by module, the same on every machine with the same Python."""

import sysconfig

from sae_lens_route.data.demo_corpus import documents, split_of


def test_the_split_is_by_module():
    assert split_of("test_json") == split_of("_json") == split_of("json")
    assert split_of("_pydecimal") == split_of("decimal")
    train, heldout = set(documents("train")), set(documents("heldout"))
    assert train and heldout and not train & heldout
    assert 0.03 < sum(map(len, heldout)) / sum(map(len, train)) < 0.3


def test_help_pages_name_no_path_of_this_machine():
    stdlib = sysconfig.get_path("stdlib")
    pages = [text for text in documents("train") if text.startswith("Python Library Documentation")]
    assert pages and not any(stdlib in page for page in pages)
