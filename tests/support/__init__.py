"""What several test modules use: small real models and SAEs, and independent computations."""
