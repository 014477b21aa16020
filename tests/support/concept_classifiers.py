"""Random labels and activations, and the best of all classifiers by loops."""

from fractions import Fraction

import numpy as np
import torch

from sae_lens_route.data.annotations import Concept
from sae_lens_route.data.concept_tokens import ConceptTokens
from sae_lens_route.evals.concept_tables import SparseTable

LEVELS = ("word", "syntax")


def random_concept_tokens(n=16, pos=16, n_concepts=4, seed=0, rate=0.3):
    """Contexts of the tiny Llama's vocabulary, two per document, with random labels.

    BOS (0) and padding (1) may be annotated, so that the SAEs' own rule has to exclude them.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 512, (n, pos), generator=generator)
    tokens[:, 0] = 0
    tokens[::3, -2:] = 1
    documents = torch.arange(n) // 2
    return ConceptTokens(
        tokens=tokens,
        labels=torch.rand(n, pos, n_concepts, generator=generator) < rate,
        annotated=torch.rand(n, pos, generator=generator) < 0.8,
        is_test=documents % 2 == 1,
        documents=documents,
        concepts=tuple(Concept(f"c{i}", LEVELS[i % 2]) for i in range(n_concepts)),
    )


def sparse_table(dense, block=0):
    """The table of a matrix `[tokens, features]` without negative entries."""
    token, feature = np.nonzero(dense)
    blocks = np.full(len(token), block, dtype=np.int16)
    return SparseTable.of(token, feature, dense[token, feature], blocks, dense.shape)


def tied_activations(n_tokens, n_features, seed, share=0.5):
    """Activations of which many are equal and `1 - share` are 0; one feature is never active."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 5, (n_tokens, n_features)).astype(np.float32) / 4
    values *= rng.random((n_tokens, n_features)) < share
    values[:, n_features // 2] = 0
    return values


def f1_of(active, positive):
    found = sum(a and p for a, p in zip(active, positive, strict=True))
    total = sum(active) + sum(positive)
    return Fraction(2 * int(found), int(total)) if total else Fraction(0)


def best_by_loops(features, labels, least):
    """For each concept the largest F1, the first feature that has it and its highest threshold.

    Args:
        features: Columns of activations.
        labels: `[tokens, C]`.
        least: The threshold below all activations.
    """
    results = []
    for positive in labels.T.tolist():
        best = (Fraction(0), -1, 0.0)
        for i, column in enumerate(features):
            for threshold in sorted({least, *column}, reverse=True):
                f1 = f1_of([x > threshold for x in column], positive)
                if f1 > best[0]:
                    best = (f1, i, threshold)
        results.append(best)
    return results
