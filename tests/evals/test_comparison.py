"""The table of a sweep: what its rows say, and that every file holds the same numbers."""

import copy
import csv
import json

import pyarrow.parquet as pq
import pytest
import torch
from support.numbers import assert_close
from support.small import TINYLLAMA_WIDTH, small_config, tokens_dataset

from sae_lens_route.errors import UserError
from sae_lens_route.evals.comparison import SweepResult, evaluate_sweep
from sae_lens_route.evals.evaluate import evaluate_all
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig, RouteTopKTrainingSAEConfig
from sae_lens_route.training.entries import SweepEntry, expand_runs
from sae_lens_route.training.sweep import SweepRunner

BLOCKS = [3, 4, 5, 6, 7]
RUNS = {
    "crosscoder": {"architecture": "crosscoder", "l1_coefficient": 1},
    "hard": {"k": [4, 8]},
    "blocks with a gap": {"k": 8, "blocks": [4, 6]},
    "plain topk": {"k": 8, "architecture": "topk", "blocks": [5]},
    "soft": {"k": 8, "routing": "soft"},
    "uniform": {"k": 8, "routing": "uniform"},
}
SIZE = {"max_tokens": 64, "batch_size": 4}


@pytest.fixture(scope="module")
def entries():
    sized = {label: {"d_sae": 96, **settings} for label, settings in RUNS.items()}
    return expand_runs(sized, TINYLLAMA_WIDTH, [0])


@pytest.fixture(scope="module")
def saes(tinyllama, entries):
    cfg = small_config(None, routed_blocks=BLOCKS)
    return SweepRunner(cfg, entries, override_model=tinyllama).run()


@pytest.fixture(scope="module")
def table(tinyllama, entries, saes):
    return evaluate_sweep(tinyllama, entries, saes, "demo:heldout", **SIZE)


def test_rows_say_what_was_trained(table, entries):
    by_name = {row.name: row for row in table.rows}
    assert list(by_name) == list(entries)
    hard, gap, plain = by_name["hard k=4"], by_name["blocks with a gap"], by_name["plain topk"]
    assert (hard.label, hard.seed, hard.architecture, hard.d_sae) == ("hard", 0, "route_topk", 96)
    assert (hard.settings.k, hard.settings.routing, plain.settings.routing) == (4, "hard", None)
    assert hard.sparsity == (4, None, None, None)
    assert by_name["crosscoder"].sparsity == (None, 1, None, None)
    assert (hard.blocks, gap.blocks, plain.blocks) == (BLOCKS, [4, 6], [5])
    assert list(hard.share_by_block) == BLOCKS and list(gap.share_by_block) == [4, 6]
    assert hard.l0 == 4 and hard.reconstruction.n_tokens == plain.reconstruction.n_tokens < 64
    assert 0 < hard.route_weight < 1 and hard.kl > 0
    assert by_name["soft"].kl is None and by_name["soft"].downstream is None
    assert by_name["crosscoder"].share_by_block is by_name["crosscoder"].route_weight is None
    dictionary = 2 * 64 * 96 + 96 + 64
    assert hard.n_parameters == dictionary + 64 * 5
    assert plain.n_parameters == dictionary  # nothing to choose, so no router
    assert by_name["crosscoder"].n_parameters == 2 * 5 * 64 * 96 + 96 + 5 * 64


def test_metrics_are_those_of_each_alone(tinyllama, saes, table):
    """Also for SAEs that read other blocks than the others, or draw blocks at random."""
    for row in table.rows:
        sae = copy.deepcopy(saes[row.name])  # a copy draws from the seed again
        alone = evaluate_all(tinyllama, {"": sae}, "demo:heldout", **SIZE)[""]
        assert_close(row.reconstruction._asdict(), alone.reconstruction._asdict())
        if alone.downstream is None:
            assert row.downstream is None
        else:
            assert_close(row.downstream._asdict(), alone.downstream._asdict())


def test_rows_are_read_back_as_they_were(table, tmp_path):
    table.write(tmp_path / "new")
    assert SweepResult.read(tmp_path / "new") == table


def read_flat(paths):
    """Rows of the CSV and of the parquet file."""
    with paths[1].open() as file:
        from_csv = list(csv.DictReader(file))
    return from_csv, pq.read_table(paths[2]).to_pylist()


def test_csv_and_parquet_hold_the_numbers_of_the_rows(table, tmp_path):
    from_csv, from_parquet = read_flat(table.write(tmp_path))
    assert len(table.rows) == len(from_csv) == len(from_parquet)
    for row, text, typed in zip(table.rows, from_csv, from_parquet, strict=True):
        expected = {
            "name": row.name,
            "label": row.label,
            "blocks": " ".join(map(str, row.blocks)),
            "k": row.settings.k,
            "n_parameters": row.n_parameters,
            "l0": row.l0,
            "norm_mse": row.norm_mse,
            "kl": row.kl,
            "route_weight": row.route_weight,
        }
        for block, share in (row.share_by_block or {}).items():
            expected[f"share_block_{block}"] = share
        for block, error in row.reconstruction.norm_mse_by_block.items():
            expected[f"norm_mse_block_{block}"] = error
        assert text.keys() == typed.keys() >= expected.keys()
        for column, value in expected.items():
            assert typed[column] == value, column
            if isinstance(value, str) or value is None:
                assert text[column] == (value or "")
            else:
                assert float(text[column]) == value, column
        of_blocks = {c for c in typed if c.startswith("norm_mse_block_") and typed[c] is not None}
        assert of_blocks <= {f"norm_mse_block_{block}" for block in row.blocks}


@torch.no_grad()
def test_numbers_are_reported_at_the_models_blocks(tinyllama, tmp_path):
    """Every token routed to the last of the blocks [2, 5, 9] counts at block 9, in every file."""
    options = {"d_in": 64, "d_sae": 96, "k": 8, "n_routed_layers": 3}
    options |= {"routing": "uniform", "route_shares": [0.0, 0.0, 1.0]}
    torch.manual_seed(0)
    sae = RouteTopKSAE(RouteTopKSAEConfig(**options))
    torch.nn.init.normal_(sae.W_enc, std=0.1)
    torch.nn.init.normal_(sae.W_dec, std=0.1)
    metadata = sae.cfg.metadata
    metadata.hook_name = "blocks.9.route.hook_resid_post"
    metadata.hook_names = [f"blocks.{block}.hook_resid_post" for block in (2, 5, 9)]
    metadata.routed_blocks = [2, 5, 9]
    metadata.context_size, metadata.prepend_bos = 16, True
    metadata.exclude_special_tokens = False
    entries = {"x": SweepEntry(RouteTopKTrainingSAEConfig(**options), [2, 5, 9])}
    result = evaluate_sweep(tinyllama, entries, {"x": sae}, tokens_dataset(4), **SIZE)
    paths = result.write(tmp_path)

    _, cache = tinyllama.run_with_cache(torch.tensor(tokens_dataset(4)["tokens"]))
    x = cache["blocks.9.hook_resid_post"].flatten(0, 1)
    n = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    error = float(((n - sae(n)).pow(2).sum(-1) / n.pow(2).sum(-1)).mean())

    (row,) = json.loads(paths[0].read_text())
    assert row["blocks"] == [2, 5, 9]
    assert row["reconstruction"]["share_by_block"] == {"2": 0, "5": 0, "9": 1}
    by_block = row["reconstruction"]["norm_mse_by_block"]
    assert by_block == {"2": None, "5": None, "9": pytest.approx(error, rel=1e-4)}
    assert row["downstream"]["kl_by_block"] == {"2": None, "5": None, "9": row["downstream"]["kl"]}
    for (flat,) in read_flat(paths):
        assert float(flat["share_block_9"]) == 1
        assert float(flat["norm_mse_block_9"]) == pytest.approx(error, rel=1e-4)
        assert float(flat["kl_block_9"]) == float(flat["kl"]) > 0
        assert flat["norm_mse_block_5"] in (None, "")
        assert not [column for column in flat if column.endswith(("block_0", "block_1", "block_4"))]


def test_a_folder_without_a_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"sweep\.json: no such file"):
        SweepResult.read(tmp_path)
    (tmp_path / "sweep.json").write_text('[{"name": "x"}]')
    with pytest.raises(UserError, match=r"sweep\.json: not the table of a sweep .*missing"):
        SweepResult.read(tmp_path)
