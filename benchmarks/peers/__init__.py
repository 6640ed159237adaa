"""The sides of ``benchmarks/against_peers.py``."""
