"""The activation cache's files: the same bits back, killed writers, and shards that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_lens_route.data.activation_shards import (
    ActivationShards,
    Manifest,
    passes_per_shard,
    quantized,
    read_manifest,
    require_disk,
)
from sae_lens_route.errors import UserError

L, D = 3, 4
GENERATOR = torch.Generator().manual_seed(0)
PASSES = [torch.randn(n, L, D, generator=GENERATOR) for n in (5, 3, 0, 4, 5, 2, 1)]


def manifest(stored="exact", dtype="float32"):
    return Manifest({"a": 1}, "text", None, [2, 5, 9], ["x", "y", "z"], 12, D, dtype, stored)


def begun(folder, stored="exact", dtype="float32"):
    return ActivationShards(folder, read_manifest(folder) or manifest(stored, dtype), 2)


def written(folder, stored="exact", dtype="float32"):
    shards = begun(folder, stored, dtype)
    for rows in PASSES:
        shards.add(rows.to(getattr(torch, dtype)))
    shards.close()
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_streams_come_back_bit_for_bit(tmp_path, dtype):
    shards = begun(written(tmp_path, dtype=dtype))
    assert shards.n_passes == len(PASSES) and shards.manifest.n_rows == sum(map(len, PASSES))
    for n in (6, 0, 2, 5, 1, 3, 4):  # in any order
        for positions in ([0, 1, 2], [2], [0, 2]):
            expected = PASSES[n].to(getattr(torch, dtype))[:, positions].unbind(1)
            found = shards.streams(n, positions)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stored", ["exact", "int8"])
def test_streams_are_the_same_before_and_after_they_are_written(tmp_path, stored):
    shards = begun(tmp_path, stored)
    for n, rows in enumerate(PASSES):
        shards.add(rows)
        before = shards.streams(n, [0, 2])
        shards.flush()
        after = shards.streams(n, [0, 2])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_int8_error_is_at_most_half_a_scale(tmp_path):
    shards = begun(written(tmp_path, "int8"))
    for n, rows in enumerate(PASSES):
        read = torch.stack(shards.streams(n, [0, 1, 2]), dim=1)
        scales = rows.double().abs().amax(-1, keepdim=True) / 127
        assert ((read.double() - rows.double()).abs() <= scales * (0.5 + 1e-4)).all()
    assert torch.equal(quantized(torch.zeros(1, 1, 4))[0], torch.zeros(1, 1, 4, dtype=torch.int8))


@pytest.mark.parametrize("killed_after", range(len(PASSES)))
def test_a_killed_writer_goes_on_to_the_same_files(tmp_path, killed_after):
    whole = written(tmp_path / "whole")
    killed = begun(tmp_path / "killed")
    for rows in PASSES[:killed_after]:
        killed.add(rows)
    killed._lock = None  # which the system does for a process that dies
    again = begun(tmp_path / "killed")
    assert again.n_passes == killed_after // 2 * 2  # whole shards
    for rows in PASSES[again.n_passes :]:
        again.add(rows)
    again.close()
    assert contents(tmp_path / "killed") == contents(whole)


def test_only_one_run_writes(tmp_path):
    first, second = begun(tmp_path), begun(tmp_path)
    first.add(PASSES[0])
    with pytest.raises(UserError, match="another run is writing"):
        second.add(PASSES[0])
    first.close()
    with pytest.raises(UserError, match="another run has written to it"):
        second.add(PASSES[0])
    assert begun(tmp_path).n_passes == 1


@pytest.mark.parametrize("damage", ["truncated", "tampered", "foreign", "missing", "shape"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    shard = written(tmp_path) / "shard-00001.safetensors"
    content = shard.read_bytes()
    changed = {
        "truncated": content[:-1],
        "tampered": content[:-1] + bytes([content[-1] ^ 1]),
        "foreign": (tmp_path / "shard-00002.safetensors").read_bytes(),
    }
    if damage in changed:
        shard.write_bytes(changed[damage])
    elif damage == "shape":
        save_file({"streams": torch.zeros(4, L, D + 1)}, shard)
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors"):
        begun(tmp_path).streams(2, [0])


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float33"}, {"width": "4"}, {"blocks": [1]}, {"shards": [[[-1], "x"]]}, {"more": 1}],
)
def test_a_damaged_manifest_is_refused(tmp_path, change):
    path = written(tmp_path) / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"cache\.json"):
        read_manifest(tmp_path)


def test_too_many_tokens_for_the_disk_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"1,000 tokens take 1000000\.0 GB, the disk has"):
        require_disk(tmp_path / "new" / "folder", 10**15, 1000)
    require_disk(tmp_path / "new" / "folder", 1, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["exact", "int8"]))
def test_a_shard_holds_what_fits_and_at_least_a_pass(pass_tokens, stored):
    description = replace(manifest(stored), width=576, blocks=list(range(16)))
    n = passes_per_shard(description, pass_tokens)
    assert n == 1 or n * pass_tokens * description.row_bytes <= 2**28
    assert (n + 1) * pass_tokens * description.row_bytes > 2**28
