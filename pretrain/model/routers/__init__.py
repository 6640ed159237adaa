"""Routers: which experts a token goes to, one kind a file."""
