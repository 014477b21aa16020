"""How good an SAE is on held-out text: reconstruction, routing, and the model's predictions."""
