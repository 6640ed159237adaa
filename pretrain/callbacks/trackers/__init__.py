"""One experiment tracker a file; their packages are imported where a recipe asks for them."""
