"""Scores of routers against hand-made choices."""

import pytest
import torch

from sae_lens_route.synthetic.routers import Choice, MassSums

MASS = torch.tensor([[4.0, 2.0, 1.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 1.0, 6.0]])


ERRORS = Choice(0.2, 0.3, 0.4, 0.1)


def scores(*parts):
    sums = MassSums()
    for mass, blocks in parts:
        sums.add(mass, torch.tensor(blocks))
    return sums.scores(ERRORS)


def test_an_oracle_has_no_regret():
    result = scores((MASS, MASS.argmax(-1).tolist()))
    for choice in (result.mass, result.best_block):
        assert (choice.routed, choice.oracle) == (1, 1)
        assert choice.gain == 1


def test_choices_by_hand_over_batches():
    result = scores((MASS[:2], [1, 0]), (MASS[2:], [2, 0]))
    # tokens 0 and 1 get half of the best mass, token 2 has none to lose, token 3 gets half
    assert result.mass.routed == pytest.approx((0.5 + 0.5 + 1 + 0.5) / 4)
    assert result.best_block.routed == pytest.approx(1 / 4)
    relative = [[1, 0.5, 0.25], [0.5, 1, 1], [1, 1, 1], [0.5, 1 / 6, 1]]
    by_block = [sum(column) / 4 for column in zip(*relative, strict=True)]
    assert result.mass.uniform == pytest.approx(sum(by_block) / 3)
    shares = [0.5, 0.25, 0.25]
    matched = sum(s * m for s, m in zip(shares, by_block, strict=True))
    assert result.mass.matched == pytest.approx(matched)
    best = [2 / 4, 2 / 4, 3 / 4]  # of each block; ties count for both
    assert result.best_block.uniform == pytest.approx(sum(best) / 3)
    assert result.norm_mse == ERRORS
    assert result.share_by_block == {0: 0.5, 1: 0.25, 2: 0.25}


def test_gains_are_relative_to_what_an_oracle_would_gain():
    choice = Choice(routed=0.2, matched=0.3, uniform=0.4, oracle=0.1)
    assert choice.gain == pytest.approx(2 / 3)
    assert choice.gain_at_shares == pytest.approx(1 / 2)
    assert Choice(0.4, 0.4, 0.4, 0.1).gain == 0


def test_one_block_for_all_gains_nothing_over_its_own_shares():
    mass = torch.rand(500, 3)
    result = scores((mass, [2] * 500))
    assert result.mass.routed == pytest.approx(result.mass.matched)
    expected = float((mass[:, 2] / mass.amax(-1)).mean())
    assert result.mass.routed == pytest.approx(expected, rel=1e-5)
    assert result.mass.gain_at_shares == pytest.approx(0, abs=1e-9)
