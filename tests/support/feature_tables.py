"""Feature tables made by hand: routed blocks 2, 5 and 9, contexts as the test says."""

from collections import Counter

import pyarrow as pa

from sae_lens_route.features.table import (
    CONTEXT_SCHEMA,
    FEATURE_SCHEMA,
    Context,
    ContextOptions,
    ContextRun,
    FeatureProfile,
    FeatureTable,
)

BLOCKS = (2, 5, 9)
HOOKS = tuple(f"blocks.{block}.hook_resid_post" for block in BLOCKS)


def make_context(feature, token="cat", activation=2.0, left="", sequence=0, position=0):
    return Context(
        feature=feature,
        token_class=token.lower(),
        token=token,
        activation=activation,
        block=BLOCKS[0],
        hook=HOOKS[0],
        weight=0.5,
        text=f"{left}<ACTIVATED>{token}</ACTIVATED> of feature-{feature}",
        sequence=sequence,
        position=position,
    )


def make_table(contexts, share_by_block=None):
    """A table of these contexts, as `find_contexts` would return it.

    `share_by_block` has the shares of each feature at the three blocks; the first by default.
    """
    contexts = sorted(contexts, key=lambda c: (c.feature, c.token_class, -c.activation))
    counts = Counter(c.feature for c in contexts)
    d_sae = max(counts) + 1
    profiles = []
    for feature in range(d_sae):
        shares = (share_by_block or {}).get(feature, [1.0, 0.0, 0.0])
        share = dict(zip(BLOCKS, shares, strict=True))
        profiles.append(
            FeatureProfile(
                feature=feature,
                interpretable=feature in counts,
                n_contexts=counts[feature],
                n_classes=1,
                n_fired=10,
                density=0.1,
                max_activation=2.0,
                mean_activation=1.0,
                n_fired_by_block={block: int(10 * s) for block, s in share.items()},
                share_by_block=share,
                mean_block=sum(block * s for block, s in share.items()),
                block_entropy=0.0,
                depth="shallow" if shares[1] + 2 * shares[2] < 1 else "deep",
            )
        )
    return FeatureTable(
        contexts=pa.Table.from_pylist([c._asdict() for c in contexts], CONTEXT_SCHEMA),
        features=pa.Table.from_pylist([as_row(p) for p in profiles], FEATURE_SCHEMA),
        run=ContextRun(
            options=ContextOptions(threshold=1.0),
            hook_names=HOOKS,
            routed_blocks=BLOCKS,
            d_sae=d_sae,
            n_tokens=1000,
            n_sequences=10,
            counts=(),
        ),
    )


def as_row(profile):
    """A profile with lists of pairs for its dicts, as pyarrow wants maps."""
    row = profile._asdict()
    for name in ("n_fired_by_block", "share_by_block"):
        row[name] = list(row[name].items())
    return row


def plain_table(n_features):
    return make_table(
        [make_context(f, activation=2.0 + i, position=i) for f in range(n_features) for i in (0, 1)]
    )
