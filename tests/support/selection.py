"""The rule of `features/selection.py`, feature by feature."""


def to_look_at_first(acts, n_kept, features=None):
    """Features that fire, the one to look at first in front.

    Args:
        acts: Activations `[..., d_sae]`, 0 at excluded tokens.
        n_kept: Number of kept tokens.
        features: Those to choose from; None for all.
    """

    def key(feature):
        active = [value for value in acts[..., feature].ravel().tolist() if value > 0]
        group = 2 if 10 * len(active) > n_kept else int(len(active) < 16)
        return group, -max(active) * len(active) / sum(active)

    chosen = range(acts.shape[-1]) if features is None else features
    return sorted((f for f in chosen if (acts[..., f] > 0).any()), key=key)
