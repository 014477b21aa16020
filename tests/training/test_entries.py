"""Entries of a sweep: what settings become, and mistakes named before a model is loaded."""

from dataclasses import replace

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from support.small import TINYLLAMA_WIDTH
from support.sweep import one_entry, sized_entries, sweep_settings

from sae_lens_route.errors import UserError
from sae_lens_route.training.entries import SweepEntry, check_entries, expand_runs


def test_entries_are_labeled_by_their_run():
    entries = sized_entries({"hard": {"k": [4, 8]}, "one": {"k": 4}}, seeds=(0, 1))
    named = {name: (entry.label, entry.sae.k, entry.seed) for name, entry in entries.items()}
    assert named == {
        "hard k=4 seed=0": ("hard", 4, 0),
        "hard k=4 seed=1": ("hard", 4, 1),
        "hard k=8 seed=0": ("hard", 8, 0),
        "hard k=8 seed=1": ("hard", 8, 1),
        "one seed=0": ("one", 4, 0),
        "one seed=1": ("one", 4, 1),
    }
    runs = {"x": {"architecture": "crosscoder", "l1_coefficient": [0.01]}}
    ((name, entry),) = sized_entries(runs).items()
    assert name == "x" and entry.sae.l1_coefficient == 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "topkk"}, r"run 'x' .*architecture='topkk': must be one of .*topk"),
        ({"kk": 3, "d_sae": 8}, r"run 'x' .*unknown field 'kk' of route_topk; did you mean 'k'\?"),
        ({"seed": 3, "d_sae": 8}, r"run 'x' .*unknown field 'seed' of route_topk"),
        ({"k": 3}, r"run 'x' .*d_sae is missing"),
        ({"blocks": 3, "d_sae": 8}, r"run 'x' .*blocks=3: must be a list"),
        ({"d_in": 3}, r"run 'x' .*d_in=3: is filled in; leave it out"),
        ({"n_routed_layers": 3}, r"run 'x' .*n_routed_layers=3: is filled in"),
        ({"lr": -1.0, "k": 3, "d_sae": 8}, r"run 'x' .*lr=-1.0: must be a positive number"),
        ({"k": 9, "d_sae": 8}, r"run 'x' .*k=9: must be between 1 and d_sae=8"),
        ({"k": [], "d_sae": 8}, r"run 'x' .*k=\[\]: give at least one value"),
        ({"k": [3, 3], "d_sae": 8}, r"run 'x' .*k=\[3, 3\]: give at least one value, each once"),
        ({"routing": "odd", "k": 3, "d_sae": 8}, r"run 'x' .*routing='odd': must be one of 'hard'"),
        (
            {"architecture": "jumprelu", "l0_coefficient": [1], "target_l0": [8], "d_sae": 8},
            r"run 'x' .*l0_coefficient and target_l0 are lists: only one can be",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        expand_runs({"x": settings}, TINYLLAMA_WIDTH, [0])


def test_entries_of_the_same_name_are_refused():
    settings = {"d_sae": 8, "k": 2}
    runs = {"x": {**settings, "k": [2, 3]}, "x k=2": settings}
    with pytest.raises(UserError, match=r"run 'x k=2' .*there is another 'x k=2'"):
        expand_runs(runs, TINYLLAMA_WIDTH, [0])
    for seeds in ([], [1, 1]):
        with pytest.raises(UserError, match=r"seeds=\[.*\]: give at least one, each once"):
            expand_runs({"x": settings}, TINYLLAMA_WIDTH, seeds)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("x", one_entry(architecture="topk", k=97), "k=97: must be between 1 and d_sae=96"),
        (
            "x",
            one_entry(architecture="topk", normalize_activations="layer_norm"),
            "normalize_activations='layer_norm': every entry reads",
        ),
        (
            "x",
            SweepEntry(SAE_TRAINING_CLASS_REGISTRY["abstopk"][1](d_in=64, d_sae=96, k=8), [3]),
            "architecture='abstopk' cannot be saved .* no 'route_abstopk'",
        ),
        ("a/b", one_entry(), "its name is that of a folder; use letters"),
        ("..", one_entry(), "its name"),
        ("", one_entry(), "its name"),
        ("checkpoints", one_entry(), "the sweep itself writes"),
        ("sweep.json", one_entry(), "the sweep itself writes"),
    ],
)
def test_an_entry_that_cannot_be_trained_or_saved_is_named(name, entry, message):
    with pytest.raises(UserError, match=f"entry {name!r}: {message}"):
        check_entries(sweep_settings(), {name: entry})


def test_sweeps_that_cannot_be_trained_are_refused():
    entries = {"x": one_entry()}
    check_entries(sweep_settings(), entries)
    with pytest.raises(UserError, match=r"entry 'x': d_in=64, but the sweep's sae\.d_in is 32"):
        check_entries(sweep_settings(sae={"d_in": 32}), entries)
    with pytest.raises(UserError, match="no entries: name at least one"):
        check_entries(sweep_settings(), {})
    with pytest.raises(UserError, match=r"from_pretrained_path='y': a sweep trains every entry"):
        check_entries(sweep_settings(from_pretrained_path="y"), entries)


def test_only_saes_without_a_router_are_plain():
    assert one_entry(architecture="topk").is_plain
    assert not one_entry().is_plain
    assert not one_entry(architecture="crosscoder_topk").is_plain
    assert replace(one_entry(), seed=3).label == "x"
