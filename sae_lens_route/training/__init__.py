"""Training one SAE, or many on one stream of activations."""
