"""A model loads the same by every road: residual streams, tokens and hook names agree."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.load_model import HookedProxyLM
from support.models import (
    MODEL_CLASSES,
    assert_same_streams,
    edit_json,
    hugging_face_streams,
    needs_bridge,
    random_tokens,
    residual_streams,
)
from support.small import TINYLLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_route.models import load as load_module
from sae_lens_route.models.kinds import d_model, n_layers
from sae_lens_route.models.load import load_model
from sae_lens_route.models.names import DEMO_FOLDER

needs_demo = pytest.mark.skipif(
    not (DEMO_FOLDER / "config.json").is_file(), reason="the demo model is not built yet"
)


@pytest.fixture(params=[TINYLLAMA, pytest.param("demo", marks=needs_demo)], ids=["tiny", "demo"])
def llama(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return str(request.param), DEMO_FOLDER if request.param == "demo" else Path(request.param)


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_every_kind_has_the_residual_streams_of_the_hugging_face_model(
    llama: tuple[str, Path], kind: str
) -> None:
    name, folder = llama
    model = load_model(name, kind)
    tokens = random_tokens(48)
    theirs = hugging_face_streams(folder, tokens, "model.layers")
    assert_same_streams(residual_streams(model, tokens), theirs)
    assert {p.dtype for p in model.parameters()} <= {torch.float32}
    assert (n_layers(model), d_model(model)) == (16, theirs.shape[-1])


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_tokens_get_exactly_one_bos_or_none(llama: tuple[str, Path], kind: str) -> None:
    model: Any = load_model(llama[0], kind)
    plain = AutoTokenizer.from_pretrained(str(llama[1]))("x = 1", add_special_tokens=False)
    bos = model.tokenizer.bos_token_id
    if kind != "AutoModelForCausalLM":  # which only tokenizes as ActivationsStore asks it to
        assert model.to_tokens("x = 1").tolist() == [[bos, *plain["input_ids"]]]
        assert model.to_tokens("x = 1", prepend_bos=False).tolist() == [plain["input_ids"]]
    as_in_store = model.to_tokens(
        "x = 1", prepend_bos=False, truncate=False, move_to_device=False, padding_side=None
    )
    assert as_in_store.tolist() == [plain["input_ids"]]


@pytest.mark.parametrize("kind", MODEL_CLASSES)
@pytest.mark.parametrize("has_bos", [True, False])
def test_a_tokenizer_that_does_not_prepend_bos_itself(
    tmp_path: Path, kind: str, has_bos: bool
) -> None:
    shutil.copytree(TINYLLAMA, tmp_path / "m")
    edit_json(tmp_path / "m" / "tokenizer.json", post_processor=None)
    if not has_bos:
        edit_json(tmp_path / "m" / "tokenizer_config.json", bos_token=None)
    model: Any = load_model(str(tmp_path / "m"), kind)
    plain = [89, 222, 30, 222, 18]
    as_in_store = {"truncate": False, "move_to_device": False, "padding_side": None}
    assert model.to_tokens("x = 1", prepend_bos=False, **as_in_store).tolist() == [plain]
    if kind != "AutoModelForCausalLM":
        expected = [0, *plain] if has_bos else plain
        assert model.to_tokens("x = 1").tolist() == [expected]


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_the_dtype_is_the_one_asked_for_not_the_one_stored(tmp_path: Path, kind: str) -> None:
    hf_model: Any = AutoModelForCausalLM.from_pretrained(TINYLLAMA)
    hf_model.to(torch.bfloat16).save_pretrained(tmp_path)
    for file in Path(TINYLLAMA).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    single = load_model(str(tmp_path), kind)
    assert residual_streams(single, random_tokens(8)).dtype == torch.float32
    half: Any = load_model(str(tmp_path), kind, dtype="bfloat16")
    assert residual_streams(half, random_tokens(8)).dtype == torch.bfloat16
    if kind == "HookedTransformer":
        assert half.cfg.dtype == torch.bfloat16


def test_classes_are_those_of_sae_lens() -> None:
    assert type(load_model(TINYLLAMA)) is HookedSAETransformer
    proxy = load_model(TINYLLAMA, "AutoModelForCausalLM", hook_names=["model.layers.3"])
    assert type(proxy) is HookedProxyLM
    assert list(proxy.hook_dict) == ["model.layers.3"]


@needs_bridge
def test_the_bridge_is_that_of_sae_lens() -> None:
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    assert type(load_model(TINYLLAMA, "TransformerBridge")) is SAETransformerBridge


def test_options_of_sae_lens_and_transformer_lens_are_understood() -> None:
    model: Any = load_model(
        TINYLLAMA,
        center_writing_weights=False,  # SAELens's default for HookedTransformer
        torch_dtype="float64",
        default_prepend_bos=False,
        default_padding_side="left",
    )
    assert model.cfg.dtype == torch.float64
    assert model.tokenizer.padding_side == "left"
    assert model.to_tokens("x = 1").tolist() == [[89, 222, 30, 222, 18]]
    with pytest.raises(ValueError, match=r"center_writing_weights=True.*residual streams"):
        load_model(TINYLLAMA, center_writing_weights=True)


# --- what cannot be loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_name", "message"),
    [
        ("./nowhere", r"model_name='\./nowhere': there is no such folder.*or 'demo'"),
        ("/no/where/at/all", "model_name='/no/where/at/all': there is no such folder"),
        ("~/no_such_model", "model_name='~/no_such_model': there is no such folder"),
        ("pythia-7m", "model_name='pythia-7m' is neither.*similar: pythia-70m"),
        ("someone/something", "model_name='someone/something' is neither.*TransformerBridge"),
    ],
)
def test_unknown_names(model_name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(model_name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_a_name_that_only_the_hub_knows(kind: str) -> None:
    with pytest.raises(ValueError, match=r"model_name='EleutherAI/pythia-70m'.*local folder"):
        load_model("EleutherAI/pythia-70m", kind)


def test_folders_that_are_not_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model_name='.*': no config.json in"):
        load_model(str(tmp_path))
    shutil.copy(Path(TINYLLAMA) / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"model_name='.*': no usable tokenizer"):
        load_model(str(tmp_path))
    # transformers would read ./gpt2 and not the official model: better to say so
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model_name='gpt2': no config.json in gpt2"):
        load_model("gpt2")


def test_unknown_class_and_dtype() -> None:
    with pytest.raises(ValueError, match=r"model_class_name='HookedMamba' is none of Hooked"):
        load_model("demo", "HookedMamba")
    with pytest.raises(ValueError, match=r"dtype='float23' is not"):
        load_model("demo", dtype="float23")


def test_a_bridge_needs_transformer_lens_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "has_transformer_bridge", lambda: False)
    with pytest.raises(ValueError, match=r"model_class_name='TransformerBridge' needs transformer"):
        load_model("demo", "TransformerBridge")
