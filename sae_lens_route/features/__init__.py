"""Features: contexts, block profiles, and scores by judges, people and surface cues."""
