"""Checkpoints in other projects' formats, each compared with the model that it came from."""
