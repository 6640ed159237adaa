"""One experiment tracker a file; their packages are imported if a recipe asks for them."""
