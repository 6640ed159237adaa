"""Rules that span the sections of a recipe."""
