"""Contexts against the reference's file, against a plain loop, and however the stream is cut."""

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden_numbers import FOLDER, golden_sae, load
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sae_lens_route import RouteTopKSAE, RouteTopKSAEConfig, features
from sae_lens_route.features import (
    ActivationBatch,
    ContextCollector,
    ContextOptions,
    FeatureTable,
    default_threshold,
    find_contexts,
    model_batches,
)

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
CONTEXTS = json.loads((FOLDER / "contexts.json").read_text())


def make_tokenizer(raw, decoder=None):
    """A tokenizer with exactly these tokens, of byte-level BPE unless told otherwise."""
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(raw)}, unk_token=raw[0]))
    tokenizer.decoder = decoder or decoders.ByteLevel()
    special = {"bos_token": BOS, "eos_token": EOS}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{k: v for k, v in special.items() if v in raw}
    )


# --- the reference's file -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_batches():
    """The reference's own pipeline up to the residual streams: its chunks, padding and batches."""
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
            batches.append(ActivationBatch(ids, torch.stack(hidden[4:13], dim=2)))
    return tokenizer, batches


@pytest.fixture(scope="module")
def lm_sae():
    sae = golden_sae(*load("seed0_lm"))
    sae.cfg.metadata.hook_names = [f"blocks.{i}.hook_resid_post" for i in range(3, 12)]
    return sae


@pytest.mark.parametrize(
    "run", CONTEXTS["runs"], ids=lambda run: "{threshold}".format(**run["args"])
)
def test_reference_contexts(run, golden_batches, lm_sae):
    tokenizer, batches = golden_batches
    options = ContextOptions.reference(**run["args"])
    ours = find_contexts(lm_sae, batches, tokenizer, options).to_reference_json()
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


def test_defaults_mask_special_tokens_on_the_golden_texts(golden_batches, lm_sae):
    tokenizer, batches = golden_batches
    table = find_contexts(lm_sae, batches, tokenizer, ContextOptions(threshold=1.0))
    assert table.run.n_tokens == CONTEXTS["n_real_positions"] - len(CONTEXTS["texts"])
    assert table.contexts.num_rows
    assert not {BOS, EOS} & set(table.contexts["token"].to_pylist())
    assert not any(BOS in t or EOS in t for t in table.contexts["text"].to_pylist())
    layers = set(table.contexts["layer"].to_pylist())
    hooks = set(table.contexts["hook"].to_pylist())
    assert hooks == {f"blocks.{i + 3}.hook_resid_post" for i in layers}


# --- a plain loop ---------------------------------------------------------------------------------

RAW = [
    BOS, EOS, ".", "!", '."', '"', ")", "?)", "Ġ\"", "Ġ", "The", "the", "Ġthe", "ĠThe", "3", "a",
    "Ġb", ".Ċ", "Ċ", '"Ċ', ",",
]  # fmt: skip
TOKENIZER = make_tokenizer(RAW)
PIECES = [t.replace("Ġ", " ").replace("Ċ", "\n") for t in RAW]
HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post")


def loop_sentence(ids, s, options):
    """First and last token of the sentence of token s, read off the text."""
    if options.sentences == "raw_tokens":
        ends = [RAW[i] in (".", "!", "?", '"', EOS) for i in ids]
        right = options.max_length // 2
    else:
        ends = [False] * len(ids)
        right = options.max_length - 1 - options.max_length // 2
        special = [i < 2 for i in ids]
        bounds = [-1, *[t for t, is_so in enumerate(special) if is_so], len(ids)]
        for a, b in pairwise(bounds):
            pieces = [PIECES[i] for i in ids[a + 1 : b]]
            text, stops = "".join(pieces), np.cumsum([len(p) for p in pieces])
            for match in re.finditer(r"""[.!?][.!?"')]*(?=\s|$)""", text):
                ends[a + 1 + int(np.searchsorted(stops, match.end()))] = True
            if b < len(ids):
                ends[b] = ends[b - 1] = True
    first = last = s
    while first > 0 and not ends[first - 1]:
        first -= 1
    while last < len(ids) - 1 and not ends[last]:
        last += 1
    if last - first + 1 > options.max_length:
        first, last = max(first, s - options.max_length // 2), min(last, s + right)
    return first, last


def loop_text(ids, s, options):
    first, last = loop_sentence(ids, s, options)
    left, right = list(ids[first:s]), list(ids[s + 1 : last + 1])
    if options.sentences == "raw_tokens":
        while left and left[0] == RAW.index(EOS):
            left.pop(0)
        while right and right[-1] == RAW.index(EOS):
            right.pop()
    text = "".join(PIECES[i] for i in left) + "<ACTIVATED>" + PIECES[ids[s]] + "</ACTIVATED>"
    text = (text + "".join(PIECES[i] for i in right)).strip()
    return text.strip('"') if options.sentences == "raw_tokens" else text


def loop_contexts(tokens, acts, layer, weight, mask, options, threshold):
    """Contexts one activation at a time, as the options word it; (contexts, kept counts)."""
    reference = options.sentences == "raw_tokens"
    found = defaultdict(lambda: defaultdict(list))
    for b, s, f in (acts > threshold).nonzero().tolist():
        token = int(tokens[b, s])
        if not mask[b, s] or (options.mask_special_tokens and token < 2):
            continue
        text = loop_text(tokens[b].tolist(), s, options)
        name = RAW[token].strip().lower()
        found[f][name].append(
            (acts[b, s, f].item(), b, s, int(layer[b, s]), weight[b, s].item(), text, PIECES[token])
        )
    kept = {}
    for f, classes in sorted(found.items()):
        rows = []
        for name, contexts in sorted(classes.items()):
            if reference:
                contexts.sort(key=lambda c: (c[0], c[5]), reverse=True)
            else:
                contexts.sort(key=lambda c: (-c[0], c[1], c[2]))
            rows += [(name, c) for c in contexts[: options.max_per_class]]
        cap = sorted(rows, key=lambda r: -r[1][0])[: options.max_contexts_per_feature]
        rows = [row for row in rows if row in cap]
        n_classes = len({name for name, _ in rows})
        if len(rows) < options.min_contexts:
            continue
        if options.max_classes is not None and n_classes > options.max_classes:
            continue
        kept[f] = rows
    return kept


def as_loop(table, reference):
    """The table's contexts in the loop's form."""
    kept = defaultdict(list)
    for row in table.contexts.to_pylist():
        assert row["hook"] == HOOKS[row["layer"]]
        kept[row["feature"]].append(row)
    out = {}
    for f, rows in kept.items():
        out[f] = [
            (r["token_class"], r["activation"], r["text"])
            if reference
            else tuple(
                r[name]
                for name in (
                    "token_class", "activation", "sequence", "position", "layer", "weight", "text",
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
    layer = torch.randint(3, (n, pos), generator=generator)
    weight = torch.rand(n, pos, generator=generator)
    mask = torch.rand(n, pos, generator=generator) < 0.9
    return tokens, acts, layer, weight, mask


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
        mask_special_tokens=draw(st.booleans()),
    )


def collect(stream, options, sizes, min_pending=2**17, threshold=None):
    """The table after adding the stream in batches of these sizes, cyclically."""
    d_sae = stream[1].shape[-1]
    with patch.object(features, "_MIN_PENDING", min_pending):
        collector = ContextCollector(4, d_sae, HOOKS, TOKENIZER, options)
        done, turn = 0, 0
        while done < len(stream[0]):
            size = sizes[turn % len(sizes)]
            collector.add(*(part[done : done + size] for part in stream))
            done, turn = done + size, turn + 1
        return collector.table(threshold)


@settings(max_examples=150, deadline=None)
@given(streams(), context_options(), st.integers(1, 4), st.sampled_from([1, 16]))
def test_table_equals_plain_loop(stream, options, size, min_pending):
    table = collect(stream, options, [size], min_pending)
    reference = options.sentences == "raw_tokens"
    if reference:  # there, the cap only ever cuts features that max_classes drops
        options = replace(options, max_contexts_per_feature=10_000)
        if options.max_classes is None:
            table = collect(stream, options, [size], min_pending)
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
@given(streams(), st.booleans())
def test_profiles_equal_plain_loop(stream, masked):
    tokens, acts, layer, _, mask = stream
    options = ContextOptions(threshold=3.0, mask_special_tokens=masked)
    table = collect(stream, options, [2])
    counted = mask & ((tokens >= 2) | (not masked))
    assert table.run.n_tokens == counted.sum()
    for f in range(acts.shape[-1]):
        profile = table.profile(f)
        active = (acts[..., f] > 0) & counted
        counts = [int((active & (layer == i)).sum()) for i in range(3)]
        total = sum(counts)
        assert profile.layer_counts == counts
        assert profile.n_fired == total
        assert profile.density == total / max(int(counted.sum()), 1)
        assert profile.max_activation == (acts[..., f][active].max().item() if total else 0)
        if not total:
            assert profile.layer_share is profile.mean_layer is profile.depth is None
            continue
        share = [count / total for count in counts]
        assert profile.layer_share == pytest.approx(share)
        mean = sum(i * p for i, p in enumerate(share))
        assert profile.mean_layer == pytest.approx(mean)
        assert profile.layer_entropy == pytest.approx(-sum(p * math.log(p) for p in share if p))
        if abs(mean - 1) > 1e-9:
            assert profile.depth == ("shallow" if mean < 1 else "deep")


# --- how the stream is cut, and the bound on memory -----------------------------------------------


def random_stream(n=60, pos=24, d_sae=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(RAW), (n, pos), generator=generator)
    acts = torch.randn(n, pos, d_sae, generator=generator).relu()
    acts = (acts * 20).round() / 20  # some are equal
    layer = torch.randint(3, (n, pos), generator=generator)
    weight = torch.rand(n, pos, generator=generator)
    return tokens, acts, layer, weight, torch.ones(n, pos, dtype=torch.bool)


@pytest.mark.parametrize("cap", [9, 256])
@pytest.mark.parametrize("sentences", ["decoded", "raw_tokens"])
def test_same_result_however_the_stream_is_cut(sentences, cap):
    options = ContextOptions(threshold=0.5, max_contexts_per_feature=cap, sentences=sentences)
    whole = collect(random_stream(), options, [60])
    for sizes in ([1], [7], [3, 20, 1]):
        for min_pending in (1, 200):
            other = collect(random_stream(), options, sizes, min_pending)
            assert other.features.equals(whole.features)
            if sentences == "raw_tokens" and cap < 256:
                continue  # equal activations at the cap: any of the equal contexts may stay
            if sentences == "raw_tokens":  # contexts with equal text are one to the reference
                columns = ["feature", "token_class", "activation", "text"]
                assert other.contexts.select(columns).equals(whole.contexts.select(columns))
            else:
                assert other.contexts.equals(whole.contexts)
                assert other.run == whole.run


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


def test_table_stays_within_its_bound():
    options = ContextOptions(threshold=0.0, max_contexts_per_feature=6)
    with patch.object(features, "_MIN_PENDING", 100):
        collector = ContextCollector(4, 12, HOOKS, TOKENIZER, options)
        batch = 4 * 24 * 12
        for seed in range(20):
            collector.add(*random_stream(n=4, seed=seed))
            assert len(collector._store) <= collector.max_rows == 12 * 6
            assert collector.n_rows <= collector.max_rows + 100 + batch
    table = collector.table()
    assert collector.n_rows <= collector.max_rows
    assert table.contexts.num_rows <= collector.max_rows
    assert features._CANDIDATE.itemsize == 42  # as the module says
    columns = (collector._pair, collector._activation, collector._slot, collector._store)
    assert sum(column.itemsize for column in columns) == 4 * 64 + 42


def test_tokens_of_rare_candidates_do_not_pile_up():
    options = ContextOptions(threshold=2.5)
    with patch.object(features, "_MAX_PENDING_TOKENS", 500):
        collector = ContextCollector(4, 12, HOOKS, TOKENIZER, options)
        for seed in range(20):
            collector.add(*random_stream(n=4, seed=seed))
            assert collector._pending.n_tokens < 500
    assert collector.table().contexts.num_rows


# --- sentences ------------------------------------------------------------------------------------


def sentence_texts(raw, tokenizer=None, **options):
    """The context of every token, for one sequence."""
    tokenizer = tokenizer or make_tokenizer(list(dict.fromkeys(raw)))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(raw)])
    options = ContextOptions(
        threshold=0.0, min_contexts=1, max_per_class=99, mask_special_tokens=False, **options
    )
    collector = ContextCollector(4, 1, HOOKS[:1], tokenizer, options)
    collector.add(ids, torch.ones(1, len(raw), 1), torch.zeros_like(ids), torch.ones(ids.shape))
    rows = sorted(collector.table().contexts.to_pylist(), key=lambda row: row["position"])
    return [re.sub("</?ACTIVATED>", "", row["text"]).strip() for row in rows]


def sentences(raw, **options):
    return list(dict.fromkeys(sentence_texts(raw, **options)))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (["He", "Ġwent", ".", "ĠShe", "Ġstayed", "."], ["He went.", "She stayed."]),
        (['"', "Go", '."', "ĠThen"], ['"Go."', "Then"]),
        (["Go", ".", '"', ")", "ĠThen"], ['Go.")', "Then"]),
        (["Go", ".", "Ċ", '"', "No", '"'], ["Go.", '"No"']),
        (["Go", ".Ċ", '"', "No", '"'], ["Go.", '"No"']),
        (["Go", ".", 'Ġ"', "No", '"'], ["Go.", '"No"']),
        (["3", ".", "14", "Ġis", "Ġpi", "!?", "ĠYes"], ["3.14 is pi!?", "Yes"]),
        (["Head", "ĊĊ", "Body"], ["Head", "Body"]),
        (["a", "Ċ", "b"], ["a\nb"]),
        (["one", EOS, BOS, "two"], ["one", EOS, BOS, "two"]),
    ],
)
def test_sentence_ends_in_decoded_text(raw, expected):
    assert sentences(raw) == expected


def test_the_reference_ends_sentences_at_raw_tokens_only():
    raw = ["Go", '."', "ĠThen", "Ġ3", ".", "14"]
    assert sentences(raw, sentences="raw_tokens") == ['Go." Then 3.', "14"]
    assert sentences(raw) == ['Go."', "Then 3.14"]


@pytest.mark.parametrize(("kind", "longest"), [("decoded", 6), ("raw_tokens", 7)])
def test_long_sentences_are_cut_around_the_token(kind, longest):
    raw = [f"Ġ{letter}" for letter in "abcdefghijklmnop"]
    texts = sentence_texts(raw, max_length=6, sentences=kind)
    lengths = [len(text.split()) for text in texts]
    assert max(lengths) == longest
    assert texts[8].split()[:4] == ["f", "g", "h", "i"]


def test_sentencepiece_tokens():
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw = ["▁He", "▁went", ".", "▁S", "he", "<0x21>", "<0x0A>", "▁Yes"]
    tokenizer = make_tokenizer(raw, decoder)
    assert list(dict.fromkeys(sentence_texts(raw, tokenizer))) == ["He went.", "She!", "Yes"]


def test_characters_cut_into_several_tokens_are_joined():
    raw = ["ĠcafÃ", "©", "Ġbar"]
    assert sentence_texts(raw)[2] == "café bar"


# --- model, files, errors -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_sae():
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=5, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=len(RAW), act_fn="gelu"
        )
    )
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=16, d_sae=24, k=6, n_routed_layers=3))
    sae.cfg.metadata.hook_names = list(HOOKS)
    return model, sae


def test_model_batches_are_the_residual_streams(model_and_sae):
    model, sae = model_and_sae
    tokens = torch.randint(len(RAW), (5, 20))
    batches = list(model_batches(model, sae, tokens.split(2)))
    _, cache = model.run_with_cache(tokens)
    streams = torch.cat([batch.activations for batch in batches])
    torch.testing.assert_close(streams, torch.stack([cache[name] for name in HOOKS], dim=2))
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), tokens)


def test_encoding_in_parts_changes_nothing(model_and_sae):
    model, sae = model_and_sae
    tokens = torch.randint(2, len(RAW), (9, 20))
    options = ContextOptions(threshold=0.2, min_contexts=2)
    whole = find_contexts(sae, model_batches(model, sae, [tokens]), TOKENIZER, options)
    assert whole.contexts.num_rows
    with patch.object(features, "_ENCODE_ELEMENTS", 2 * 20 * 24):
        parts = find_contexts(sae, model_batches(model, sae, [tokens]), TOKENIZER, options)
    places = ["feature", "token_class", "sequence", "position", "layer", "text"]
    assert parts.contexts.select(places).equals(whole.contexts.select(places))
    routing = sae.route(torch.cat([b.activations for b in model_batches(model, sae, [tokens])]))
    acts = sae.encode(routing.x_route)
    for feature in whole.interpretable:
        contexts = whole.contexts_of(feature)
        assert contexts[0].activation == max(c.activation for c in contexts)
        for c in contexts:
            at = (c.sequence, c.position)
            assert c.layer == routing.layer[at] and c.hook == HOOKS[c.layer]
            assert c.weight == pytest.approx(routing.weight[at].item())
            assert c.activation == pytest.approx(acts[at][feature].item(), rel=1e-5)


def test_files_give_the_table_back(tmp_path):
    options = ContextOptions(threshold=1.0, thresholds=(0.5, 2.0))
    table = collect(random_stream(), options, [7])
    table.to_parquet(tmp_path / "contexts")
    back = FeatureTable.from_parquet(tmp_path / "contexts")
    assert back.contexts.equals(table.contexts)
    assert back.features.equals(table.features)
    assert back.run == table.run
    assert back.profile(3) == table.profile(3)
    assert back.contexts_of(3) == table.contexts_of(3) != []
    layout = back.to_reference_json(tmp_path / "contexts.json")
    assert json.loads((tmp_path / "contexts.json").read_text()) == layout
    assert layout["total_latents"] == len(table.interpretable)


def test_an_empty_stream_gives_an_empty_table(tmp_path):
    table = ContextCollector(4, 3, HOOKS, TOKENIZER).table()
    assert table.interpretable == [] and table.contexts.num_rows == 0
    assert table.profile(2).layer_share is None
    table.to_parquet(tmp_path)
    assert FeatureTable.from_parquet(tmp_path).run == table.run


def test_default_threshold_is_the_papers_at_its_width():
    assert default_threshold(2048) == pytest.approx(15, rel=2e-3)
    collector = ContextCollector(64, 3, HOOKS, TOKENIZER)
    assert collector.options.threshold == default_threshold(64)


def test_errors(model_and_sae):
    with pytest.raises(ValueError, match="thresholds must be >= 0"):
        ContextOptions(threshold=-1.0)
    with pytest.raises(ValueError, match=r"max_contexts_per_feature=64.*65"):
        ContextOptions(max_classes=32, max_contexts_per_feature=64)
    with pytest.raises(ValueError, match="min_contexts=0"):
        ContextOptions(min_contexts=0)
    collector = ContextCollector(4, 1, HOOKS, TOKENIZER)
    ids = torch.full((1, 2), len(RAW))
    with pytest.raises(ValueError, match="token ids outside"):
        collector.add(ids, torch.ones(1, 2, 1), ids * 0, torch.ones(1, 2))
    sae = RouteTopKSAE(RouteTopKSAEConfig(d_in=16, d_sae=24, k=6, n_routed_layers=3))
    with pytest.raises(ValueError, match=r"metadata\.hook_names names 0 hooks.*3 layers"):
        find_contexts(sae, [], TOKENIZER)
    with pytest.raises(IndexError):
        collector.table().profile(1)
    with pytest.raises(ValueError, match=r"threshold=3.0: contexts were collected at 0\.66"):
        collector.table(3.0)
