"""Options, and tables in memory and in files."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from support.contexts import TOKENIZER, collect, random_stream
from support.feature_tables import BLOCKS, HOOKS

from sae_lens_route.errors import UserError
from sae_lens_route.features.contexts import ContextCollector
from sae_lens_route.features.table import ContextOptions, FeatureTable, default_threshold


def test_files_hold_the_whole_table(tmp_path):
    options = ContextOptions(threshold=1.0, thresholds=(0.5, 2.0))
    table = collect(random_stream(), options, [7])
    table.to_parquet(tmp_path / "contexts")
    back = FeatureTable.from_parquet(tmp_path / "contexts")
    assert back.contexts.equals(table.contexts)
    assert back.features.equals(table.features)
    assert back.run == table.run
    assert back.profile(3) == table.profile(3)
    assert back.contexts_of(3) == table.contexts_of(3) != []
    assert back.run.routed_blocks == BLOCKS


def test_the_references_json_has_the_contexts_by_feature_and_class(tmp_path):
    table = collect(random_stream(), ContextOptions(threshold=1.0), [7])
    table.to_reference_json(tmp_path / "contexts.json")
    layout = json.loads((tmp_path / "contexts.json").read_text())
    assert layout["total_latents"] == len(table.interpretable)
    assert list(map(int, layout["latent_context_map"])) == table.interpretable
    rows = [
        (int(feature), name, context["context"], context["activation"])
        for feature, classes in layout["latent_context_map"].items()
        for name, contexts in classes.items()
        for context in contexts
    ]
    columns = ["feature", "token_class", "text", "activation"]
    assert rows == [tuple(row.values()) for row in table.contexts.select(columns).to_pylist()]


def test_parquet_names_blocks_not_routes(tmp_path):
    tokens, acts, route, weight, kept = random_stream()
    options = ContextOptions(threshold=1.0)
    # every token is routed to the last of the blocks 2, 5 and 9
    table = collect((tokens, acts, route * 0 + 2, weight, kept), options, [7])
    table.to_parquet(tmp_path)
    contexts, features = (
        pq.read_table(tmp_path / f"{name}.parquet") for name in ("contexts", "features")
    )
    assert set(contexts["block"].to_pylist()) == {9}
    assert set(contexts["hook"].to_pylist()) == {"blocks.9.hook_resid_post"}
    row = features.to_pylist()[3]
    assert row["mean_block"] == 9.0 and row["depth"] == "deep" and row["block_entropy"] == 0.0
    assert dict(row["n_fired_by_block"]) == {2: 0, 5: 0, 9: row["n_fired"]}
    assert dict(row["share_by_block"]) == {2: 0.0, 5: 0.0, 9: 1.0}


def test_depth_goes_by_the_route():
    tokens, acts, _, weight, kept = random_stream(pos=20)
    # a third at block 2, a third at 5, a third at 9: the mean block, 5 1/3, is past block 5
    route = torch.arange(tokens.numel()).reshape(tokens.shape) % 3
    profile = collect((tokens, acts * 0 + 1, route, weight, kept), ContextOptions(), [7]).profile(0)
    assert profile.mean_block == pytest.approx(16 / 3)
    assert profile.depth == "deep"  # the mean route is the middle, 1
    route = route.masked_fill(torch.arange(tokens.numel()).reshape(tokens.shape) == 2, 0)
    profile = collect((tokens, acts * 0 + 1, route, weight, kept), ContextOptions(), [7]).profile(0)
    assert profile.mean_block > 5 and profile.depth == "shallow"


def test_an_empty_stream_gives_an_empty_table(tmp_path):
    table = ContextCollector(4, 3, BLOCKS, HOOKS, TOKENIZER).table()
    assert table.interpretable == [] and table.contexts.num_rows == 0
    assert table.profile(2).share_by_block is None
    table.to_parquet(tmp_path)
    assert FeatureTable.from_parquet(tmp_path).run == table.run


def test_default_threshold_is_the_papers_at_its_width():
    assert default_threshold(2048) == pytest.approx(15, rel=2e-3)
    collector = ContextCollector(64, 3, BLOCKS, HOOKS, TOKENIZER)
    assert collector.options.threshold == default_threshold(64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, r"threshold=-1\.0: must be at least 0"),
        ({"max_classes": 32, "max_contexts_per_feature": 64}, "max_contexts_per_feature=64.*65"),
        ({"min_contexts": 0}, "min_contexts=0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ContextOptions(**options)


def test_a_table_of_an_earlier_version_is_refused(tmp_path):
    """Its activations had no units."""
    collect(random_stream(), ContextOptions(threshold=1.0), [7]).to_parquet(tmp_path)
    path = tmp_path / "features.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["mean_activation"]), path)
    with pytest.raises(UserError, match=r"earlier version.*find them again with `features`"):
        FeatureTable.from_parquet(tmp_path)
