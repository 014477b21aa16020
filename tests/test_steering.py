"""Steering: edits do to features what they say, where they say, and the text shows it.

On small random models every claim is held against the brute-force splice of `test_splice.py`. On
the demo model: clamping a feature makes the tokens more probable that follow its activations.
"""

import json
import math
import random

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from test_splice import (
    KINDS,
    VOCAB,
    brute_force,
    brute_routing,
    clean_streams,
    close,
    make_model,  # noqa: F401
    no_gradients_and_one_thread,  # noqa: F401
    route_sae,
    run,
)

from sae_lens_route.activations import RoutedActivationsStore
from sae_lens_route.demo import demo_config
from sae_lens_route.models import DEMO_FOLDER, decoder_blocks
from sae_lens_route.runner import RouteSAETrainingRunner
from sae_lens_route.splice import attach
from sae_lens_route.steering import (
    FeatureEdit,
    default_clamp,
    edit_features,
    render,
    steer,
)

ROUTED, N_LAYERS = [1, 2, 4], 6
LLAMAS = [kind for kind in KINDS if kind.endswith("llama")]
GPT2S = [kind for kind in KINDS if kind.endswith("gpt2")]
EDITS = [
    FeatureEdit(3, "set", 6.0),
    FeatureEdit(70, "add", -2.5),
    FeatureEdit(11, "scale", 3.0),
    FeatureEdit(40, "ablate"),
]
NO_CHANGE = [FeatureEdit(3, "scale", 1.0), FeatureEdit(11, "add", 0.0)]
PROMPT = "A list of header names"


@pytest.fixture
def small(make_model):  # noqa: F811
    """`small(kind)`: a model and a RouteSAE for it, as if trained without BOS and EOS."""

    def make(kind="hooked-llama"):
        sae = route_sae(ROUTED, seed=1, k=48)
        sae.cfg.metadata.exclude_special_tokens = True
        return make_model(kind, N_LAYERS), sae

    return make


def edited_latents(z):
    """What EDITS do, written out."""
    z = z.clone()
    z[..., 3] = 6.0
    z[..., 70] -= 2.5
    z[..., 11] *= 3.0
    z[..., 40] = 0.0
    return z


def by_hand(sae, mask, use_error_term=True):
    """The edit of the activation x where `mask`, from the definition."""

    def f(x):
        z = sae.encode(x)
        difference = (edited_latents(z) - z) @ sae.W_dec
        reconstruction = edited_latents(z) @ sae.W_dec + sae.b_dec
        edited = x + difference if use_error_term else reconstruction
        return torch.where(mask.unsqueeze(-1), edited, x)

    return f


def random_tokens(*shape):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(3))


# --- the hook function ---------------------------------------------------------------------------


def test_each_mode_on_the_latents():
    sae = route_sae(ROUTED)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = sae.encode(x)
    feature = int((z > 0).sum((0, 1)).argmax())  # active on some tokens and not on others
    before = z[..., feature]
    assert (before > 0).any() and (before == 0).any()
    expected = {"set": 0 * before + 4, "add": before + 4, "scale": before * 4, "ablate": 0 * before}
    for mode, after in expected.items():
        edit = FeatureEdit(feature, mode, None if mode == "ablate" else 4.0)
        moved = edit_features(sae, edit)(x) - x
        close(moved, (after - before).unsqueeze(-1) * sae.W_dec[feature])
        assert moved.abs().max() > 0.01
        if mode in ("scale", "ablate"):  # a token without the feature keeps its bits
            assert torch.equal((x + moved)[before == 0], x[before == 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_error_term", [True, False])
def test_logits_with_edits(small, kind, use_error_term):
    model, sae = small(kind)
    tokens = random_tokens(3, 11)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    clean = run(model, tokens)
    f = by_hand(sae, mask, use_error_term)
    expected, *_ = brute_force(model, sae, ROUTED, f, lambda: run(model, tokens))
    assert (expected - clean).abs().max() > 0.1
    hook = edit_features(sae, EDITS, mask, use_error_term=use_error_term)
    with attach(model, sae) as handle:
        close(model.run_with_hooks(tokens, fwd_hooks=[(handle.name, hook)]), expected)
        nothing = edit_features(sae, NO_CHANGE)
        same = model.run_with_hooks(tokens, fwd_hooks=[(handle.name, nothing)])
    assert torch.equal(same, clean)


def test_positions():
    sae = route_sae(ROUTED)
    x = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edit = FeatureEdit(3, "set", 6.0)
    everywhere = edit_features(sae, edit)(x)
    for positions in ([1, -1], torch.tensor([False, True, False, False, False, True])):
        edited = edit_features(sae, edit, positions)(x)
        assert torch.equal(edited[:, [0, 2, 3, 4]], x[:, [0, 2, 3, 4]])
        close(edited[:, [1, 5]], everywhere[:, [1, 5]])
        assert not torch.equal(edited, x)
    for positions, message in (([2, 6], r"positions=\[6\]"), (torch.ones(4) > 0, r"\[4\].*fit")):
        with pytest.raises(ValueError, match=message):
            edit_features(sae, edit, positions)(x)


def test_gradients_flow_through_an_edit(small):
    """Against a finite difference along the feature's decoder direction."""
    model, sae = small()
    tokens, step = random_tokens(1, 7), 1e-5
    direction = torch.zeros_like(sae.W_dec)
    direction[3] = torch.linspace(-1, 1, 32, dtype=torch.float64)
    hooks = [("blocks.4.hook_resid_route", edit_features(sae, FeatureEdit(3, "set", 6.0)))]

    def logit():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 5]

    with attach(model, sae):
        with torch.enable_grad():
            sae.W_dec.requires_grad_(True)
            (gradient,) = torch.autograd.grad(logit(), sae.W_dec)
            sae.W_dec.requires_grad_(False)
        values = []
        for sign in (1, -1):
            sae.W_dec += sign * step * direction
            values.append(logit())
            sae.W_dec -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert slope.abs() > 1e-3
    close((gradient * direction).sum(), slope, 1e-5)


# --- texts ---------------------------------------------------------------------------------------


def ids_of(result, generated=None):
    wanted = (t for t in result.tokens if generated is None or t.generated == generated)
    return [t.token_id for t in wanted]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["prompt", "generated", "both"])
def test_steered_texts_against_brute_force(small, kind, where):
    """Text, blocks, weights and activations, with and without a cache."""
    model, sae = small(kind)
    hooks_before = list(model.hook_dict)
    cached, uncached = (
        steer(model, sae, PROMPT, EDITS, where=where, max_new_tokens=8, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert list(model.hook_dict) == hooks_before

    n_prompt, n_new = len(ids_of(cached, False)), len(ids_of(cached, True))
    assert n_new == 8
    assert ids_of(cached) == ids_of(uncached) and cached.text == uncached.text
    assert cached.clean_token_ids == uncached.clean_token_ids
    assert cached.clean_token_ids != tuple(ids_of(cached, True))

    # the SAE knows nothing of BOS; the token written last is never read
    steered = torch.zeros(1, n_prompt + n_new, dtype=torch.bool)
    steered[:, 1:n_prompt] = where != "generated"
    steered[:, n_prompt:-1] = where != "prompt"
    assert [t.steered for t in cached.tokens] == steered[0].tolist()
    assert cached.n_steered == steered.sum()

    tokens = torch.tensor([ids_of(cached)])
    f = by_hand(sae, steered)
    logits, chosen, met = brute_force(model, sae, ROUTED, f, lambda: run(model, tokens))
    assert logits.argmax(-1)[0, n_prompt - 1 : -1].tolist() == ids_of(cached, True)
    clean_ids = torch.tensor([[*ids_of(cached, False), *cached.clean_token_ids]])
    clean_logits = run(model, clean_ids)
    assert (
        clean_logits.argmax(-1)[0, n_prompt - 1 : -1].tolist() == clean_ids[0, n_prompt:].tolist()
    )

    _, streams = clean_streams(decoder_blocks(model), ROUTED, lambda: run(model, tokens))
    p, _ = brute_routing(sae, streams)
    z = sae.encode(met)
    features = [edit.feature for edit in EDITS]
    before = z[0, :-1, features]
    after = torch.where(steered[0, :-1, None], edited_latents(z)[0, :-1, features], before)
    assert (before > 0).any() and len(chosen[0, :-1].unique()) > 1
    for result in (cached, uncached):
        rows = result.tokens[:-1]
        assert [t.block for t in rows] == [ROUTED[i] for i in chosen[0, :-1].tolist()]
        close(torch.tensor([t.weight for t in rows], dtype=p.dtype), p[0, :-1], 1e-6)
        close(torch.tensor([t.before for t in rows], dtype=p.dtype), before, 1e-6)
        close(torch.tensor([t.after for t in rows], dtype=p.dtype), after, 1e-6)
        last = result.tokens[-1]
        assert last.block is last.weight is last.before is last.after is None


@pytest.mark.parametrize("kind", LLAMAS)
def test_edits_that_change_nothing_give_the_clean_text(small, kind):
    model, sae = small(kind)
    for options in ({}, {"do_sample": True, "temperature": 1.5}):
        result = steer(model, sae, PROMPT, NO_CHANGE, max_new_tokens=6, seed=4, **options)
        assert result.text == result.clean_text
        assert tuple(ids_of(result, True)) == result.clean_token_ids


@pytest.mark.parametrize("kind", GPT2S)
def test_sampling(small, kind):
    model, sae = small(kind)

    def sampled(seed, **options):
        options = {"do_sample": True, "max_new_tokens": 6, **options}
        return steer(model, sae, PROMPT, EDITS, seed=seed, **options)

    state = torch.random.get_rng_state()
    first = sampled(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert sampled(0) == first
    assert ids_of(sampled(0, use_cache=False)) == ids_of(first)
    assert ids_of(sampled(1)) != ids_of(first)
    greedy = sampled(0, do_sample=False)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        nearly_greedy = sampled(0, **options)
        assert nearly_greedy.text == greedy.text and nearly_greedy.clean_text == greedy.clean_text


def test_several_prompts(small):
    model, sae = small()
    prompts = ["to", PROMPT, "HTTP"]
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 2}
    results = steer(model, sae, prompts, EDITS, **options)
    assert results == [steer(model, sae, prompt, EDITS, **options) for prompt in prompts]
    assert [result.prompt for result in results] == prompts


def test_uniform_routing_is_drawn_again_from_its_seed(small):
    model, _ = small()
    sae = route_sae(ROUTED, routing="uniform")
    first = steer(model, sae, PROMPT, EDITS, max_new_tokens=6)
    assert {token.weight for token in first.tokens[:-1]} == {1.0}
    assert steer(model, sae, PROMPT, EDITS, max_new_tokens=6) == first


def test_how_a_prompt_begins(small, monkeypatch):
    model, sae = small()
    tokenizer = model.tokenizer
    bos, plain = tokenizer.bos_token_id, tokenizer(PROMPT, add_special_tokens=False)["input_ids"]

    def steered(**options):
        return steer(model, sae, PROMPT, EDITS, max_new_tokens=4, **options)

    with_bos = steered()
    assert ids_of(with_bos, False) == [bos, *plain]
    assert [t.steered for t in with_bos.tokens] == [False] + [True] * (len(plain) + 3) + [False]
    for excluded in (False, None, [plain[1]]):
        sae.cfg.metadata.exclude_special_tokens = excluded
        flags = [t.steered for t in steered().tokens]
        assert flags[0] and flags[1] and flags[2] == (excluded != [plain[1]])
    sae.cfg.metadata.prepend_bos = False
    assert ids_of(steered(), False) == plain
    sae.cfg.metadata.prepend_bos = True

    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}bot:"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = steered()
    written = tokenizer(f"<user>{PROMPT}</>bot:", add_special_tokens=False)["input_ids"]
    assert ids_of(chat, False) == written and chat.prompt == PROMPT
    assert ids_of(steered(chat_template=False), False) == [bos, *plain]


@pytest.mark.parametrize("kind", GPT2S)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_whose_padding_is_bos(small, kind, side):
    """As GPT-2's in TransformerLens, which then looks for padding in what it is given."""
    model, sae = small(kind)
    tokenizer = model.tokenizer
    expected = steer(model, sae, PROMPT, EDITS, max_new_tokens=6)
    pad, padding_side = tokenizer.pad_token, tokenizer.padding_side
    try:
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.bos_token, side
        assert steer(model, sae, PROMPT, EDITS, max_new_tokens=6) == expected
    finally:
        tokenizer.pad_token, tokenizer.padding_side = pad, padding_side


@pytest.mark.parametrize("kind", LLAMAS)
def test_the_end_of_a_text(small, kind):
    """A text ends at the tokenizer's EOS."""
    model, sae = small(kind)
    free = ids_of(steer(model, sae, PROMPT, EDITS, max_new_tokens=6), True)
    tokenizer = model.tokenizer
    stop, eos = free[3], tokenizer.eos_token
    try:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
        ended = steer(model, sae, PROMPT, EDITS, max_new_tokens=6)
    finally:
        tokenizer.eos_token = eos
    assert ids_of(ended, True) == free[: free.index(stop) + 1]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureEdit(-1, "set", 1.0), "feature=-1"),
        (lambda: FeatureEdit(True, "set", 1.0), "feature=True"),
        (lambda: FeatureEdit(1, "set"), "value=None: mode='set'"),
        (lambda: FeatureEdit(1, "scale", math.nan), "value=nan"),
        (lambda: FeatureEdit(1, "ablate", 2.0), "value=2.0"),
        (lambda: FeatureEdit.parse("1:clamp:2"), "edit='1:clamp:2'.*mode='clamp'"),
        (lambda: FeatureEdit.parse("x:set:2"), "edit='x:set:2'"),
        (lambda: FeatureEdit.parse("1:set:2:3"), "edit='1:set:2:3'"),
    ],
)
def test_edits_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_edits_as_text():
    assert FeatureEdit.parse("17:set:5") == FeatureEdit(17, "set", 5.0)
    assert FeatureEdit.parse("17:scale:-1.5") == FeatureEdit(17, "scale", -1.5)
    assert FeatureEdit.parse("17:ablate") == FeatureEdit(17, "ablate")
    assert str(FeatureEdit(17, "set", 5)) == "feature 17 set to 5"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": []}, "edits=\\[\\]"),
        ({"edits": [FeatureEdit(128, "set", 1.0)]}, "feature=128: the SAE has features 0 to 127"),
        ({"edits": [FeatureEdit(5, "add", 1.0), FeatureEdit(5, "ablate")]}, "feature=5: .*two"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 3, "top_p": 0.5}, "top_k=3 and top_p=0.5"),
        ({"max_new_tokens": 2000}, "prompt='A list.*max_new_tokens=2000.*context of"),
        ({"prompt": ["to", "word " * 200]}, "prompt='word word.*max_new_tokens=4"),
        ({"prompt": ""}, "prompt=''"),
    ],
)
@pytest.mark.parametrize("kind", ["hooked-llama", "proxy-gpt2"])
def test_mistakes_are_found_before_any_work(small, monkeypatch, kind, options, message):
    model, sae = small(kind)
    if options.get("prompt") == "":
        sae.cfg.metadata.prepend_bos = False
    options = {"prompt": PROMPT, "edits": EDITS, "max_new_tokens": 4, **options}
    inner = model.model if isinstance(model, HookedProxyLM) else model
    monkeypatch.setattr(inner, "generate", None)
    with pytest.raises(ValueError, match=message):
        steer(model, sae, **options)


def test_other_mistakes(small, monkeypatch):
    model, sae = small()
    monkeypatch.setattr(model, "generate", None)
    soft = route_sae(ROUTED, routing="soft")
    with pytest.raises(ValueError, match="routing='soft'"):
        steer(model, soft, PROMPT, EDITS)
    with attach(model, sae), pytest.raises(ValueError, match="attached already"):
        steer(model, sae, PROMPT, EDITS, max_new_tokens=2)


# --- for people ----------------------------------------------------------------------------------


def test_a_result_as_text_and_as_json(small):
    model, sae = small()
    result = steer(model, sae, PROMPT, EDITS, max_new_tokens=5)
    as_json = json.loads(json.dumps(result.to_dict()))
    assert as_json["text"] == result.text and as_json["clean_text"] == result.clean_text
    assert as_json["edits"][0] == {"feature": 3, "mode": "set", "value": 6.0}
    assert len(as_json["tokens"]) == len(result.tokens)
    assert as_json["tokens"][1]["block"] == result.tokens[1].block

    result = result._replace(text="a\n" + "long line " * 9, clean_text="def f():\n\treturn")
    page = render(result, width=60)
    lines = page.splitlines()
    assert (
        "feature 3 set to 6; feature 70 plus -2.5; feature 11 times 3; feature 40 ablated" in page
    )
    start = next(i for i, line in enumerate(lines) if line.startswith("clean"))
    assert lines[start + 2].split("|")[0].strip() == "def f():"
    assert lines[start + 3].startswith("    return ")
    assert all(len(line) <= 60 for line in lines[start : start + 6])
    assert len(lines) > len(render(result, tokens=False).splitlines()) + len(result.tokens)
    assert '"<|begin_of_text|>"' in page


# --- what steering is for ------------------------------------------------------------------------

N_FEATURES, N_TOP = 40, 10


def sign_test(n_raised, n):
    """Probability of as many or more if a rise were as likely as a fall."""
    return sum(math.comb(n, i) for i in range(n_raised, n + 1)) / 2**n


@pytest.fixture(scope="module")
def demo():
    """The demo model, a RouteSAE trained on it for a moment, and held-out contexts."""
    if not (DEMO_FOLDER / "config.json").is_file():
        pytest.skip("the demo model is not built yet")
    cfg = demo_config("", training_tokens=60_000)
    cfg.output_path, cfg.checkpoint_path, cfg.n_checkpoints = None, None, 0
    runner = RouteSAETrainingRunner(cfg)
    with torch.enable_grad():
        sae = runner.run().requires_grad_(False)
    store = RoutedActivationsStore.from_sae(runner.model, sae, "demo:heldout")
    heldout = torch.cat(list(store.token_batches(4 * 256)))
    return runner.model, sae, heldout


@pytest.fixture(scope="module")
def own_tokens(demo):
    """Feature -> the tokens that are its own, for 40 features drawn from those that fire often.

    They are next-token statistics of training text, with no model output in them: the tokens v
    that follow the strongest quarter of the feature's activations, by their share in the divergence
    from the base rate, P(v | feature) log(P(v | feature) / P(v)).
    """
    model, sae, _ = demo
    store = RoutedActivationsStore.from_sae(model, sae, "demo:train")
    acts, following = [], []
    with torch.no_grad(), attach(model, sae) as handle:
        for tokens in store.token_batches(24_000):
            _, cache = model.run_with_cache(tokens, names_filter=handle.name, stop_at_layer=12)
            kept = store.kept(tokens)[:, :-1]
            acts.append(sae.encode(cache[handle.name])[:, :-1][kept])
            following.append(tokens[:, 1:][kept])
    acts, following = torch.cat(acts), torch.cat(following)
    n_vocab = model.cfg.d_vocab
    base = following.bincount(minlength=n_vocab) / len(following)
    often = ((acts > 0).sum(0) >= 100).nonzero().flatten().tolist()
    own = {}
    for feature in random.Random(0).sample(often, N_FEATURES):
        z = acts[:, feature]
        strong = z >= z[z > 0].quantile(0.75)
        rate = following[strong].bincount(minlength=n_vocab) / strong.sum()
        share = torch.where(rate > 0, rate * (rate / base).log(), 0.0)
        own[feature] = share.topk(N_TOP).indices
    return own


def mass(logits, tokens):
    """Probability of the token set. Not its logarithm: that rises for tokens of other features too
    (42 of 48), because a disturbed model is less sure of everything."""
    return logits.softmax(-1)[..., tokens].sum(-1)


def rises(model, sae, edit, tokens, steered, of):
    """Mean rise of the mass of each token set in `of`, at the steered positions."""
    hook = edit_features(sae, edit, steered)
    clean = model(tokens)
    with attach(model, sae) as handle:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(handle.name, hook)])
    return [float((mass(logits, own) - mass(clean, own))[steered].mean()) for own in of]


def test_clamping_raises_a_features_own_tokens_on_prompts(demo, own_tokens):
    model, sae, heldout = demo
    tokens = heldout[:4, :48]
    steered = tokens > 1  # neither BOS nor EOS
    own, other = [], []
    for feature, following in own_tokens.items():
        strangers = own_tokens[random.Random(feature).choice([*own_tokens.keys() - {feature}])]
        edit = FeatureEdit(feature, "set", default_clamp(sae.cfg.d_in))
        rise = rises(model, sae, edit, tokens, steered, of=(following, strangers))
        own.append(rise[0])
        other.append(rise[1])
    n_raised, n_others = sum(r > 0 for r in own), sum(r > 0 for r in other)
    n_more = sum(a > b for a, b in zip(own, other, strict=True))
    print(f"prompts: own tokens rise for {n_raised} of {len(own)}, mean {sum(own) / len(own):.4f}")
    print(f"another feature's: for {n_others}, mean {sum(other) / len(other):.4f}; less: {n_more}")
    assert len(own) >= 20
    assert sign_test(n_raised, len(own)) < 0.01 and sign_test(n_more, len(own)) < 0.01


def test_clamping_raises_a_features_own_tokens_on_generated_text(demo, own_tokens):
    """Steered while they are written, the prompts not: the reference touches none of these."""
    model, sae, heldout = demo
    prompts, n_new = heldout[:4, :16], 9
    own = []
    for feature, following in own_tokens.items():
        edit = FeatureEdit(feature, "set", default_clamp(sae.cfg.d_in))
        hook_function = edit_features(sae, edit)

        def while_writing(x, hook, hook_function=hook_function):
            return hook_function(x) if x.shape[1] == 1 else x

        with attach(model, sae) as handle, model.hooks(fwd_hooks=[(handle.name, while_writing)]):
            tokens = model.generate(
                prompts,
                max_new_tokens=n_new,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
        steered = torch.zeros_like(tokens, dtype=torch.bool)
        steered[:, prompts.shape[1] : -1] = True
        own += rises(model, sae, edit, tokens, steered, of=(following,))
    n_raised = sum(r > 0 for r in own)
    print(
        f"generated: own tokens rise for {n_raised} of {len(own)}, mean {sum(own) / len(own):.4f}"
    )
    assert len(own) >= 20 and sign_test(n_raised, len(own)) < 0.01
