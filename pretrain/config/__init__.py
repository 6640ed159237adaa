"""The recipe: typed schema, loading with overrides, and rules that hold between sections."""
