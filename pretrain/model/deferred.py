"""Models whose parameters have shapes and no values yet: building one takes no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def without_values() -> Iterator[None]:
    """Let modules that are built in this context keep the shapes of their parameters alone.

    Each parameter is on the meta device from the moment that its module gets it; what modules then
    do to its values does nothing. Buffers are real, and so is a parameter that keeps its initial
    value (:func:`pretrain.model.init.keep_initial_value`).
    """
    # torch's annotation lacks the return value that its documentation has.
    hook = register_module_parameter_registration_hook(_shape_alone)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _shape_alone(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """The parameter that the module gets instead; None for the same one."""
    # The same object, too, for what is on the meta device already: weights may be tied.
    if parameter.is_meta or getattr(parameter, "keeps_initial_value", False):
        return None
    # A new tensor, no copy: torch imports sympy to copy what is expanded.
    shape_alone = nn.Parameter(
        parameter.detach().new_empty(parameter.shape, device="meta"), parameter.requires_grad
    )
    # DeepSpeed's tags, such as the name of an expert's group, are attributes.
    shape_alone.__dict__.update(parameter.__dict__)
    return shape_alone


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter and its name there, by the parameter's id.

    A tied parameter has several.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, name))
    return places
