"""Contexts against the reference's file, against a plain loop, and on a model."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.context_loop import loop_contexts
from support.contexts import BOS, EOS, RAW, TOKENIZER, collect, random_stream
from support.feature_tables import BLOCKS, HOOKS
from support.golden import FOLDER, golden_sae, load
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_route.data.kept_tokens import KeptTokens, excluded_token_ids
from sae_lens_route.data.reading import ActivationBatch, activation_batches
from sae_lens_route.errors import UserError
from sae_lens_route.features import contexts as room
from sae_lens_route.features.contexts import ContextCollector, find_contexts
from sae_lens_route.features.table import ContextOptions
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig

CONTEXTS = json.loads((FOLDER / "contexts.json").read_text())

# --- the reference's file -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_batches():
    """The reference's pipeline up to the residual streams: its chunks, padding and batches."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tinyllama", pad_token=EOS)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "tinyllama", dtype=torch.float32)
    size = CONTEXTS["dataset_max_length"]
    chunks = [
        " ".join(words[i : i + size])
        for words in (text.split() for text in CONTEXTS["texts"])
        for i in range(0, len(words), size)
    ]
    encoded = tokenizer(
        chunks, max_length=size, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert encoded.input_ids.numel() == CONTEXTS["n_positions"]
    batches = []
    with torch.no_grad():
        for ids, mask in zip(
            encoded.input_ids.split(CONTEXTS["batch_size"]),
            encoded.attention_mask.split(CONTEXTS["batch_size"]),
            strict=True,
        ):
            hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            streams, kept = torch.stack(hidden[4:13], dim=2), torch.ones_like(ids, dtype=torch.bool)
            batches.append(ActivationBatch(ids, streams, kept, tuple(range(3, 12))))
    return tokenizer, batches


@pytest.fixture(scope="module")
def lm_sae():
    sae = golden_sae(*load("seed0_lm"))
    sae.cfg.metadata.hook_names = [f"blocks.{i}.hook_resid_post" for i in range(3, 12)]
    return sae


@pytest.mark.parametrize(
    "run", CONTEXTS["runs"], ids=lambda run: "{threshold}".format(**run["args"])
)
def test_reference_contexts(run, golden_batches, lm_sae, tmp_path):
    tokenizer, batches = golden_batches
    options = ContextOptions.reference(**run["args"])
    table = find_contexts(lm_sae, batches, tokenizer, options)
    table.to_reference_json(tmp_path / "contexts.json")
    ours = json.loads((tmp_path / "contexts.json").read_text())
    expected = run["output"]
    contexts = ours["latent_context_map"]
    assert ours["total_latents"] == expected["total_latents"]
    if "class_counts" in expected:
        counts = {f: {c: len(x) for c, x in of.items()} for f, of in contexts.items()}
        assert counts == expected["class_counts"]
        return
    assert {k: ours[k] for k in run["args"]} == run["args"]
    assert list(contexts) == list(expected["latent_context_map"])
    for feature, classes in expected["latent_context_map"].items():
        assert list(contexts[feature]) == list(classes)
        for name, wanted in classes.items():
            found = contexts[feature][name]
            assert [c["context"] for c in found] == [c["context"] for c in wanted]
            assert [c["activation"] for c in found] == pytest.approx(
                [c["activation"] for c in wanted], abs=1e-4
            )


def test_excluded_tokens_have_no_contexts_on_the_golden_texts(golden_batches, lm_sae):
    tokenizer, batches = golden_batches
    rule = KeptTokens(tuple(excluded_token_ids(True, tokenizer)))
    batches = [batch._replace(kept=rule.mask(batch.tokens)) for batch in batches]
    table = find_contexts(lm_sae, batches, tokenizer, ContextOptions(threshold=1.0))
    assert table.run.n_tokens == CONTEXTS["n_real_positions"] - len(CONTEXTS["texts"])
    assert table.contexts.num_rows
    assert not {BOS, EOS} & set(table.contexts["token"].to_pylist())
    assert not any(BOS in t or EOS in t for t in table.contexts["text"].to_pylist())
    for row in table.contexts.to_pylist():
        assert 3 <= row["block"] < 12 and row["hook"] == f"blocks.{row['block']}.hook_resid_post"


# --- a plain loop ---------------------------------------------------------------------------------


def as_loop(table, reference):
    """The table's contexts in the loop's form."""
    kept = defaultdict(list)
    for row in table.contexts.to_pylist():
        assert row["hook"] == f"blocks.{row['block']}.hook_resid_post"
        kept[row["feature"]].append(row)
    out = {}
    for f, rows in kept.items():
        out[f] = [
            (r["token_class"], r["activation"], r["text"])
            if reference
            else tuple(
                r[name]
                for name in (
                    "token_class", "activation", "sequence", "position", "block", "weight", "text",
                    "token",
                )
            )
            for r in rows
        ]  # fmt: skip
    return out


@st.composite
def streams(draw):
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    n, pos, d_sae = draw(st.integers(1, 9)), draw(st.integers(1, 16)), draw(st.integers(1, 4))
    tokens = torch.randint(len(RAW), (n, pos), generator=generator)
    # few distinct values, so that many are equal
    values = torch.randint(
        0, draw(st.sampled_from([3, 8, 1000])), (n, pos, d_sae), generator=generator
    )
    acts = values.float() * (torch.rand(n, pos, d_sae, generator=generator) < 0.6)
    route = torch.randint(3, (n, pos), generator=generator)
    weight = torch.rand(n, pos, generator=generator)
    kept = torch.rand(n, pos, generator=generator) < 0.9
    return tokens, acts, route, weight, kept


@st.composite
def context_options(draw):
    max_per_class = draw(st.integers(1, 3))
    max_classes = draw(st.sampled_from([None, 3, 6]))
    min_contexts = draw(st.integers(1, 5))
    least = max(min_contexts, max_per_class * (max_classes or 0) + 1)
    return ContextOptions(
        threshold=draw(st.sampled_from([0.0, 1.0, 1.5, 4.0])),
        thresholds=(2.0, 5.0),
        max_per_class=max_per_class,
        max_length=draw(st.integers(1, 9)),
        min_contexts=min_contexts,
        max_classes=max_classes,
        max_contexts_per_feature=draw(st.sampled_from([least, 256])),
        sentences=draw(st.sampled_from(["decoded", "raw_tokens"])),
    )


@settings(max_examples=150, deadline=None)
@given(streams(), context_options(), st.integers(1, 4), st.sampled_from([1, 16]))
def test_table_equals_plain_loop(stream, options, size, min_queue):
    table = collect(stream, options, [size], min_queue)
    reference = options.sentences == "raw_tokens"
    if reference:  # there, the cap only ever cuts features that max_classes drops
        options = replace(options, max_contexts_per_feature=10_000)
        if options.max_classes is None:
            table = collect(stream, options, [size], min_queue)
    for count in table.run.counts:
        kept = loop_contexts(*stream, options, count.threshold)
        assert count.n_features == len(kept)
        assert count.n_contexts == sum(map(len, kept.values()))
    kept = loop_contexts(*stream, options, options.threshold)
    assert table.interpretable == list(kept)
    wanted = {}
    for f, rows in kept.items():
        if reference:
            rows = sorted(rows, key=lambda r: (r[0], -r[1][0], r[1][5]))
            wanted[f] = [(name, c[0], c[5]) for name, c in rows]
        else:
            wanted[f] = [(name, *c) for name, c in rows]
    assert as_loop(table, reference) == wanted


@settings(max_examples=30, deadline=None)
@given(streams())
def test_profiles_equal_plain_loop(stream):
    _, acts, route, _, kept = stream
    table = collect(stream, ContextOptions(threshold=3.0), [2])
    assert table.run.n_tokens == kept.sum()
    for f in range(acts.shape[-1]):
        profile = table.profile(f)
        active = (acts[..., f] > 0) & kept
        counts = [int((active & (route == i)).sum()) for i in range(3)]
        total = sum(counts)
        assert profile.n_fired_by_block == dict(zip(BLOCKS, counts, strict=True))
        assert profile.n_fired == total
        assert profile.density == total / max(int(kept.sum()), 1)
        assert profile.max_activation == (acts[..., f][active].max().item() if total else 0)
        mean_activation = acts[..., f][active].double().mean().item() if total else None
        assert profile.mean_activation == pytest.approx(mean_activation)
        if not total:
            assert profile.share_by_block is profile.mean_block is profile.depth is None
            continue
        share = [count / total for count in counts]
        assert profile.share_by_block == pytest.approx(dict(zip(BLOCKS, share, strict=True)))
        mean = sum(block * p for block, p in zip(BLOCKS, share, strict=True))
        assert profile.mean_block == pytest.approx(mean)
        assert profile.block_entropy == pytest.approx(-sum(p * math.log(p) for p in share if p))
        mean_route = share[1] + 2 * share[2]
        if abs(mean_route - 1) > 1e-9:
            assert profile.depth == ("shallow" if mean_route < 1 else "deep")


@pytest.mark.parametrize("max_classes", [None, 4])
def test_one_pass_for_several_thresholds_equals_separate_passes(max_classes):
    several = (0.5, 1.0, 1.5, 2.0)
    options = ContextOptions(
        threshold=1.0, thresholds=several, max_classes=max_classes, max_contexts_per_feature=9
    )
    together = collect(random_stream(), options, [7], 50)
    assert [count.threshold for count in together.run.counts] == list(several)
    for count in together.run.counts:
        alone = collect(
            random_stream(), replace(options, threshold=count.threshold, thresholds=()), [7], 50
        )
        assert alone.run.counts == (count,)
        of_all = collect(random_stream(), options, [7], 50, threshold=count.threshold)
        assert of_all.contexts.equals(alone.contexts)
        assert of_all.features.equals(alone.features)
        assert of_all.run.options.threshold == count.threshold
        if count.threshold == options.threshold:
            assert of_all.contexts.equals(together.contexts)


# --- a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = {"n_layers": 10, "d_model": 16, "n_ctx": 32, "d_head": 8, "n_heads": 2}
    model = HookedTransformer(
        HookedTransformerConfig(**cfg, d_vocab=len(RAW), act_fn="gelu", device="cpu")
    )
    model.tokenizer = TOKENIZER
    return model


def make_sae(exclude_special_tokens=False):
    torch.manual_seed(0)
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=16, d_sae=24, k=6, n_routed_layers=3))
    sae.cfg.metadata.hook_names = list(HOOKS)
    sae.cfg.metadata.exclude_special_tokens = exclude_special_tokens
    return sae


def random_tokens():
    return torch.randint(len(RAW), (9, 20), generator=torch.Generator().manual_seed(0))


def test_contexts_are_the_models_activations(model):
    sae, tokens = make_sae(), random_tokens()
    options = ContextOptions(threshold=0.2, min_contexts=2)
    batches = activation_batches(model, sae, tokens, batch_size=2)
    table = find_contexts(sae, batches, TOKENIZER, options)
    _, cache = model.run_with_cache(tokens)
    routing = sae.route(torch.stack([cache[name] for name in HOOKS], dim=2))
    acts = sae.encode(routing.x_route) / routing.weight.unsqueeze(-1)
    assert table.contexts.num_rows
    for feature in table.interpretable:
        contexts = table.contexts_of(feature)
        assert contexts[0].activation == max(c.activation for c in contexts)
        for c in contexts:
            at = (c.sequence, c.position)
            assert c.block == BLOCKS[routing.route[at]]
            assert c.hook == f"blocks.{c.block}.hook_resid_post"
            assert c.weight == pytest.approx(routing.weight[at].item())
            assert c.activation == pytest.approx(acts[at][feature].item(), rel=1e-5)


def test_encoding_in_parts_changes_nothing(model):
    sae, tokens = make_sae(), random_tokens()
    options = ContextOptions(threshold=0.2, min_contexts=2)
    batches = list(activation_batches(model, sae, tokens, batch_size=9))
    whole = find_contexts(sae, batches, TOKENIZER, options)
    assert whole.contexts.num_rows
    with patch.object(room, "ENCODE_ELEMENTS", 2 * 20 * 24):
        parts = find_contexts(sae, batches, TOKENIZER, options)
    columns = ["feature", "token_class", "sequence", "position", "block", "text"]
    assert parts.contexts.select(columns).equals(whole.contexts.select(columns))


@pytest.mark.parametrize("exclude", [True, False, [RAW.index("The"), RAW.index("3")]])
def test_contexts_are_of_the_tokens_that_the_sae_was_trained_on(model, exclude):
    sae, tokens = make_sae(exclude), random_tokens()
    sae.cfg.metadata.seqpos_slice = (1, 15)
    excluded = {True: [0, 1], False: []}[exclude] if isinstance(exclude, bool) else exclude
    kept = [(b, s) for b in range(9) for s in range(1, 15) if int(tokens[b, s]) not in excluded]
    options = ContextOptions(
        threshold=0.0, min_contexts=1, max_per_class=200, max_contexts_per_feature=10_000
    )
    table = find_contexts(sae, activation_batches(model, sae, tokens), TOKENIZER, options)
    assert table.run.n_tokens == len(kept)
    columns = ["sequence", "position"]
    rows = table.contexts.select(columns).to_pylist()
    assert {(row["sequence"], row["position"]) for row in rows} == set(kept)
    for feature in range(24):
        profile = table.profile(feature)
        assert profile.n_fired == sum(profile.n_fired_by_block.values()) == profile.n_contexts


def test_errors():
    collector = ContextCollector(4, 1, BLOCKS, HOOKS, TOKENIZER)
    ids, kept = torch.full((1, 2), len(RAW)), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(UserError, match=f"token ids {len(RAW)} to {len(RAW)}"):
        collector.add(ids, torch.ones(1, 2, 1), ids * 0, torch.ones(1, 2), kept)
    sae = make_sae()
    sae.cfg.metadata.hook_names = None
    with pytest.raises(UserError, match=r"metadata\.hook_names=\[\]"):
        find_contexts(sae, [], TOKENIZER)
    with pytest.raises(IndexError):
        collector.table().profile(1)
    with pytest.raises(UserError, match=r"threshold=3.0: contexts were collected at 0\.66"):
        collector.table(3.0)
