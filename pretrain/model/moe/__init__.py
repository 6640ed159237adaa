"""Mixtures of experts: two kinds of layer behind one interface (``interface.MoEOutput``)."""
