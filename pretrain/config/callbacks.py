"""Callbacks that a recipe adds to those that every run has.

The project itself defines no kind: plugins do.
"""

from __future__ import annotations

from pretrain.core.registry import Component


class CallbackConfig(Component):
    """A callback of rank 0.

    ``implementation`` is called with this section and the run, a ``CallbackRun``.
    """
