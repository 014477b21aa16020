"""A saved SAE names its language model, and no code of a stranger runs when that is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from support.hostile import HOSTILE_OPTIONS, MODEL_PAYLOADS, model_folder, saved_sae
from support.models import MODEL_CLASSES
from support.small import TINYLLAMA

from sae_lens_route.errors import UserError
from sae_lens_route.models.generation import Sampling, generate
from sae_lens_route.models.load import load_model, load_named_model
from sae_lens_route.splice.language_model import load_model_of

GREEDY = Sampling(2, False, 1.0, None, None, use_cache=True)
LOADS_WITHOUT_ITS_PAYLOAD = {
    "known_type",
    "extra_pickles",
    "chat_template",
    "importable",
}
"""Good models with something added that is not needed; the others cannot be loaded without code."""


@pytest.mark.parametrize("kind", MODEL_CLASSES)
@pytest.mark.parametrize("payload", MODEL_PAYLOADS)
def test_no_payload_of_a_model_folder_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: str, kind: str
) -> None:
    marker = tmp_path / "ran"
    folder = model_folder(tmp_path / "model", payload, marker)
    monkeypatch.chdir(folder)
    try:
        model = load_named_model(str(folder), kind, {})
    except UserError as error:
        assert payload not in LOADS_WITHOUT_ITS_PAYLOAD, error
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert payload in LOADS_WITHOUT_ITS_PAYLOAD
        generate(model, [0, 5, 7], GREEDY)
        if payload == "chat_template":
            with pytest.raises(Exception, match=r"unsafe|is undefined"):
                model.tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert not marker.exists()


@pytest.mark.parametrize("name", HOSTILE_OPTIONS)
def test_options_of_a_file_that_could_run_code_are_refused_by_name(name: str) -> None:
    options = HOSTILE_OPTIONS[name]
    with pytest.raises(UserError, match="model_from_pretrained_kwargs") as refused:
        load_named_model(TINYLLAMA, "HookedTransformer", options)
    assert next(iter(options)) in str(refused.value)
    assert "--trust-remote-code" in str(refused.value)


def test_harmless_options_of_a_file_are_taken() -> None:
    model: Any = load_named_model(
        TINYLLAMA, None, {"dtype": "float64", "n_ctx": 32, "default_prepend_bos": False}
    )
    assert (model.cfg.dtype, model.cfg.n_ctx) == (torch.float64, 32)
    assert model.cfg.default_prepend_bos is False


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "qwen3-0.6b", "microsoft/phi-2", "santacoder"])
def test_names_for_which_transformer_lens_runs_code_need_trust(name: str) -> None:
    with pytest.raises(UserError, match="TransformerLens runs code of this model's repository"):
        load_named_model(name, "HookedTransformer", {"revision": "refs/pr/1"})


@pytest.mark.parametrize("kind", MODEL_CLASSES)
@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("custom_generate", "custom_generate/ holds code"),
        ("attention_kernel", "asks for attn_implementation='attacker/kernel'"),
        ("nested_kernel", "asks for _attn_implementation='attacker/kernel'"),
        ("zipped_pickle", "pickles of more than tensors|Unable to load weights"),  # transformers 4
    ],
)
def test_code_in_a_folder_that_the_user_names_needs_trust(
    tmp_path: Path, payload: str, message: str, kind: str
) -> None:
    marker = tmp_path / "ran"
    folder = model_folder(tmp_path / "model", payload, marker)
    with pytest.raises(UserError, match=message):
        load_model(str(folder), kind)
    assert not marker.exists()


def test_the_user_may_trust(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = model_folder(tmp_path / "model", "unknown_type", marker)
    with pytest.raises(UserError, match="comes with code of its own, which is not run"):
        load_model(str(folder), "AutoModelForCausalLM")
    assert not marker.exists()
    load_named_model(str(folder), "AutoModelForCausalLM", {}, trust_remote_code=True)
    assert marker.read_text() == "ran"  # so the payload is one


# --- the model of a saved SAE --------------------------------------------------------------------


def test_the_model_of_an_sae_may_be_given(tmp_path: Path, tinyllama: Any) -> None:
    sae: Any = SAE.load_from_disk(saved_sae(tmp_path, tinyllama, "somewhere/else"))
    with pytest.raises(UserError, match="somewhere/else"):
        load_model_of(sae)
    model = load_model_of(sae, model_name=TINYLLAMA)
    tokens = torch.arange(6).view(1, 6)
    assert torch.equal(model(tokens), tinyllama(tokens))


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, tinyllama: Any) -> None:
    sae: Any = SAE.load_from_disk(saved_sae(tmp_path, tinyllama, "org/name"))
    with pytest.raises(UserError, match=r"width 64, the model has width 128; .*'org/name'"):
        load_model_of(sae, model_name="demo")
    sae.cfg.metadata.hook_names = ["model.layers.3", "model.layers.5", "model.layers.6"]
    with pytest.raises(UserError, match=r"hook_names=\['model.layers.3'.*no such hooks"):
        load_model_of(sae, model_name=TINYLLAMA)


def test_metadata_without_a_model(tmp_path: Path, tinyllama: Any) -> None:
    sae: Any = SAE.load_from_disk(saved_sae(tmp_path, tinyllama, ""))
    with pytest.raises(UserError, match="model_name is missing"):
        load_model_of(sae)
