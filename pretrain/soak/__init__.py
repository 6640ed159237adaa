"""A drill: a run is killed again and again, and must end as if nothing had happened."""
