"""Language models: loading them, what differs between their kinds, and generation."""
