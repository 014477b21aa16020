"""The paper's experiments: every method trained, evaluated and compared with one command."""
