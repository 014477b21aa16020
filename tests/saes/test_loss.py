"""NormMSE per coordinate and per token."""

import torch

from sae_lens_route.saes.loss import mse, norm_mse, normalized_mse


def test_norm_mse_is_the_squared_error_over_the_squared_norm():
    target = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], dtype=torch.float64)
    preds = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    assert mse(preds, target).tolist() == [[[0.0, 9.0], [1.0, 1.0]]]
    assert normalized_mse(preds, target).tolist() == [[[0.0, 9 / 25], [1 / 4, 1 / 4]]]
    assert norm_mse(preds, target).tolist() == [[9 / 25, 1 / 2]]


def test_the_loss_reaches_the_target_too():
    """The target is the router's output: detached, the router would not learn from the loss."""
    target = torch.tensor([3.0, 4.0], requires_grad=True)
    norm_mse(torch.tensor([3.0, 1.0]), target).backward()
    # d/dt |t - p|^2 / |t|^2 = 2 (t - p) / 25 - 2 * 9 / 25^2 t
    expected = torch.tensor([-18 / 625 * 3, 6 / 25 - 18 / 625 * 4])
    torch.testing.assert_close(target.grad, expected)
