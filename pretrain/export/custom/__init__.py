"""The export target ``custom``: a model class that travels with the weights.

It is for models that no architecture of transformers computes.
"""
