"""Guards: what a run does when something goes wrong with its numbers or its data."""
