"""Needle in a haystack: does a model find one fact in a long context, wherever it was said?"""
