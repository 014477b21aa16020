"""The demo corpus: split by module, the same on every machine with the same Python."""

import hashlib
import subprocess
import sys
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


def test_the_corpus_does_not_depend_on_what_is_imported():
    """This process has imported pytest, which replaces functions that help pages show."""
    code = (
        "import hashlib; from sae_lens_route.data.demo_corpus import documents\n"
        "print(hashlib.sha256(repr(documents('train')).encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    alone = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(repr(documents("train")).encode()).hexdigest() == alone
