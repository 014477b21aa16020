"""A saved SAE is what was saved, or refused in one line that names file and field."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save_file
from support.architectures import every_architecture, random_sae
from support.command_line import call, error_line
from support.mutant_outcomes import outcome
from support.mutants import mutants
from support.saved_folders import CFG, WEIGHTS, Base, good_folders

from sae_lens_route.errors import UserError
from sae_lens_route.saes.saved import load_saved_sae

GOOD = {"refused", "as saved", "as the files say"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    return {base.name: base for base in good_folders(tmp_path_factory.mktemp("good"))}


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CFG).read_text())
    for name, value in changes.items():
        config.pop(name) if value is ... else config.update({name: value})
    (folder / CFG).write_text(json.dumps(config))


def edit_metadata(folder: Path, **changes: Any) -> None:
    edit(folder, metadata={**json.loads((folder / CFG).read_text())["metadata"], **changes})


@pytest.fixture
def folder(bases: dict[str, Base], tmp_path: Path) -> Path:
    """A good RouteSAE that a test may damage."""
    copy = tmp_path / "sae"
    copy.mkdir()
    for name in (CFG, WEIGHTS):
        (copy / name).write_bytes((bases["topk, new"].folder / name).read_bytes())
    return copy


def hub_loader(folder: Path) -> Any:
    """For `SAE.from_pretrained`: SAELens's own reading, from a folder instead of the Hub."""

    def load(
        repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: Any
    ) -> Any:
        return (*sae_lens_disk_loader(folder, device, cfg_overrides), None)

    return load


LOADERS: dict[str, Any] = {
    "load_saved_sae": load_saved_sae,
    "load_from_disk": SAE.load_from_disk,
    "from_pretrained": lambda path: SAE.from_pretrained("a/b", "c", converter=hub_loader(path)),
}
every_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@pytest.mark.filterwarnings("ignore")
def test_500_folders_with_one_thing_wrong(bases: dict[str, Base], tmp_path: Path) -> None:
    counts = Counter(
        outcome(load_saved_sae, mutant)
        for mutant in mutants(list(bases.values()), 500, tmp_path, seed=11)
    )
    assert set(counts) == GOOD, counts
    assert counts["refused"] > 350


@pytest.mark.skipif(
    version("typer").startswith("0.12."), reason="typer 0.12 cannot start with a recent click"
)
@pytest.mark.filterwarnings("ignore")
def test_info_on_a_mutant_is_json_or_one_line(bases: dict[str, Base], tmp_path: Path) -> None:
    for mutant in mutants(list(bases.values()), 100, tmp_path, seed=12):
        result = call("info", mutant.folder)
        if result.exit_code == 0:
            assert json.loads(result.stdout)["weights"]["W_dec"]
        else:
            assert len(result.output.splitlines()) == 1, result.output
            assert str(mutant.folder) in error_line(result)


def test_every_good_folder_loads(bases: dict[str, Base]) -> None:
    for base in bases.values():
        for load in LOADERS.values():
            weights = load(base.folder).state_dict()
            assert weights.keys() == base.weights.keys()
            for name, value in base.weights.items():
                assert torch.equal(weights[name], value.to(weights[name].dtype))


@every_loader
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": ...}, "k: is missing"),
        ({"k": 99}, "k=99: must be between 1 and d_sae=16"),
        ({"k": "8"}, "k='8': must be int"),
        ({"k": True}, "k=True: must be int"),
        ({"d_sae": 10**30}, "d_sae=10+: must be int"),
        ({"routing": "sideways"}, "routing='sideways': must be one of"),
        ({"aggregation": ...}, "aggregation: is missing"),
        ({"apply_b_dec_to_input": ...}, "apply_b_dec_to_input: is missing"),
        ({"route_shares": [0.5, 0.25, 0.25]}, "route_shares=.*: only routing='uniform'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"n_routed_layers": 2}, "metadata.routed_blocks=.*n_routed_layers=2"),
    ],
)
def test_fields_of_the_configuration(folder: Path, load: Any, changes: Any, message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=f"cfg.json: {message}"):
        load(folder)


def test_a_k_that_the_architecture_does_not_have(folder: Path) -> None:
    """`SAE.load_from_disk` itself drops unknown fields before any class sees them."""
    edit(folder, architecture="route_standard")
    with pytest.raises(UserError, match="k=4: the architecture 'route_standard' has no k"):
        load_saved_sae(folder)


@every_loader
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_names": ["blocks.2.hook_resid_post"]}, "hook_names=.*names 1 blocks"),
        ({"hook_names": ["a", "b", "c"]}, "hook_names=.*not residual streams"),
        ({"routed_blocks": [2, 3, 6]}, "metadata.hook_names=.*disagrees with routed_blocks"),
        ({"routed_blocks": [5, 3, 2], "hook_names": None}, "must ascend"),
        ({"hook_name": "blocks.4.route.hook_resid_post"}, "hook_name=.*last routed block"),
        ({"context_size": "16"}, "context_size='16': must be int or null"),
        ({"exclude_special_tokens": ["a"]}, "exclude_special_tokens="),
        ({"weights_sha256": {"W_enc": "x"}}, "weights_sha256 names"),
        ({"weights_sha256": 5}, "weights_sha256=5"),
    ],
)
def test_fields_of_the_metadata(folder: Path, load: Any, changes: Any, message: str) -> None:
    edit_metadata(folder, **changes)
    with pytest.raises(UserError, match=f"cfg.json: .*{message}"):
        load(folder)


@every_loader
def test_a_version_that_would_drop_the_metadata(folder: Path, load: Any) -> None:
    edit_metadata(folder, sae_lens_version="5.9.0")
    with pytest.raises(UserError, match="sae_lens_version"):
        load(folder)


@every_loader
def test_every_flipped_bit_of_the_weights_is_seen(folder: Path, load: Any) -> None:
    content = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(start, len(content), (40,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(UserError, match=r"sae_weights.safetensors: \w+ (is not|holds)"):
            load(folder)


@every_loader
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "W_router"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, load: Any, name: str, value: float) -> None:
    edit_metadata(folder, weights_sha256=None)
    weights = load_file(folder / WEIGHTS)
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(UserError, match=f"sae_weights.safetensors: {name} .*not finite"):
        load(folder)


@every_loader
@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("gated, old", {"r_mag": 3e4}, r"r_mag gives encoder weights W_enc \* exp\(r_mag\)"),
        # exp(88) is a float32, 10 times as much is none
        ("gated, old", {"r_mag": 88.0, "W_enc": 10.0}, "r_mag gives encoder weights"),
        ("topk, float64, old", {"W_dec": 0.0}, "W_dec has rows of norms"),
        ("topk, float64, old", {"W_dec": 1e300}, "W_dec (has rows of norms|holds values)"),
    ],
)
def test_functions_that_are_not_finite(
    bases: dict[str, Base],
    tmp_path: Path,
    load: Any,
    base: str,
    changes: dict[str, float],
    message: str,
) -> None:
    """Finite weights without digests, whose first row or value is changed."""
    weights = bases[base].weights
    for name, value in changes.items():
        weights[name][0] = value
    (tmp_path / CFG).write_bytes((bases[base].folder / CFG).read_bytes())
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"sae_weights.safetensors: {message}.* not finite"):
        load(tmp_path)


def test_thresholds_of_older_checkpoints_that_are_not_finite(tmp_path: Path) -> None:
    random_sae("jumprelu").save_model(tmp_path)
    edit_metadata(tmp_path, weights_sha256=None)
    weights = load_file(tmp_path / WEIGHTS)
    weights["log_threshold"] = weights.pop("threshold").clamp(min=1e-6).log()
    save_file(weights, tmp_path / WEIGHTS)
    TrainingSAE.load_from_disk(tmp_path)
    weights["log_threshold"][0] = 1000.0
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="log_threshold gives thresholds that are not finite"):
        TrainingSAE.load_from_disk(tmp_path)


@every_loader
def test_names_and_shapes_without_digests(folder: Path, load: Any) -> None:
    edit_metadata(folder, weights_sha256=None)
    good = load_file(folder / WEIGHTS)
    for weights, message in (
        ({**good, "W_enc": good["W_dec"].clone()}, r"W_enc has shape \[16, 8\], not \[8, 16\]"),
        ({**good, "W_skip": torch.ones(2)}, "W_skip is no weight of the SAE"),
        ({k: v for k, v in good.items() if k != "b_enc"}, "b_enc is missing"),
    ):
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(UserError, match=message):
            load(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    edit_metadata(folder, weights_sha256=None)
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "b_enc": weights["b_enc"].int()}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"b_enc has dtype torch.int32"):
        load_saved_sae(folder)


def test_a_narrower_dtype_is_converted_after_the_check(folder: Path) -> None:
    with pytest.warns(UserWarning, match="weights_sha256 cannot be checked"):
        direct = SAE.load_from_disk(folder, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked = load_saved_sae(folder, dtype="bfloat16")
        SAE.load_from_disk(folder, dtype="float64")  # converts back for the comparison
    assert torch.equal(direct.W_enc, checked.W_enc)
    assert checked.W_enc.dtype == torch.bfloat16


@every_loader
def test_an_sae_that_was_changed_is_saved_with_its_own_digests(
    folder: Path, load: Any, tmp_path: Path
) -> None:
    sae = load(folder)
    assert "weights_sha256" not in sae.cfg.metadata
    sae.W_dec.data.mul_(2)
    sae.save_model(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").W_dec, sae.W_dec)


@every_architecture
def test_checkpoints_have_digests_too(architecture: str, tmp_path: Path) -> None:
    sae = random_sae(architecture)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    fresh = type(sae)(sae.cfg)
    fresh.load_weights_from_checkpoint(tmp_path)
    for other in (again, fresh):
        for name, value in sae.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)

    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    for load in (TrainingSAE.load_from_disk, fresh.load_weights_from_checkpoint):
        with pytest.raises(UserError, match="is not the tensor that was saved"):
            load(tmp_path)


@every_architecture
def test_a_checkpoint_with_a_missing_field(architecture: str, tmp_path: Path) -> None:
    random_sae(architecture).save_model(tmp_path)
    edit(tmp_path, n_routed_layers=...)
    with pytest.raises(UserError, match="n_routed_layers: is missing"):
        TrainingSAE.load_from_disk(tmp_path)
