"""Products with the tables of many small experts (PEER)."""
