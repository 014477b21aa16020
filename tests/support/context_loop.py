"""Contexts by a plain loop over activations, to compare `ContextCollector` with."""

import re
from collections import defaultdict
from itertools import pairwise

import numpy as np

from support.contexts import EOS, PIECES, RAW
from support.feature_tables import BLOCKS


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


def loop_contexts(tokens, acts, route, weight, kept, options, threshold):
    """Contexts of each feature, one activation at a time, as the options say."""
    reference = options.sentences == "raw_tokens"
    found = defaultdict(lambda: defaultdict(list))
    for b, s, f in (acts > threshold).nonzero().tolist():
        token = int(tokens[b, s])
        if not kept[b, s]:
            continue
        text = loop_text(tokens[b].tolist(), s, options)
        name = RAW[token].strip().lower()
        found[f][name].append(
            (
                acts[b, s, f].item(),
                b,
                s,
                BLOCKS[route[b, s]],
                weight[b, s].item(),
                text,
                PIECES[token],
            )
        )
    shown = {}
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
        shown[f] = rows
    return shown
