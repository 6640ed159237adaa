"""The export target ``custom``: a model class of our own that travels with the weights, for what no
architecture of transformers computes.
"""
