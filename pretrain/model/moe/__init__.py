"""Mixtures of experts: each kind has a section of the recipe and a layer (``base.MoELayer``)."""
