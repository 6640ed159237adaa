"""Mixtures of experts: for each kind a section of the recipe and a layer (``base.MoELayer``)."""
