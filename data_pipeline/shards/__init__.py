"""Shards: tokens on disk, their manifest, and how they are read and verified."""
