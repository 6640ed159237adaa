"""The recipe: typed schema, loading with overrides, cross-section rules, and the errors of the whole project."""
