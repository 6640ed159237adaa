"""Guards: what a run does when a step or its data go wrong."""
