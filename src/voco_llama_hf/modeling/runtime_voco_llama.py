"""How a model computes in spite of what is done to its modules: weights elsewhere, layers that drop caches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def execution_device(module: torch.nn.Module) -> torch.device:
    """
    Where a module computes. Weights that accelerate offloads lie elsewhere, on disk with nothing but a shape in the
    model; its hooks know the device that they are brought to.
    """
    devices = (hooked_device(submodule, None) for submodule in module.modules())
    known = next((device for device in devices if device is not None), None)
    return next(module.parameters()).device if known is None else known


def hooked_device(module: torch.nn.Module, default: torch.device | None) -> torch.device | None:
    """The device that a hook of accelerate brings the inputs of this very module to, `default` if it has none."""
    # accelerate keeps its hooks under this name, one or several in a sequence, and has no public way to ask
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook])]
    known = [device for device in devices if device is not None]
    return torch.device(known[0]) if known else default


@contextmanager
def awake(module: torch.nn.Module) -> Iterator[None]:
    """The parameters of this very module, without its children, at hand outside of its `forward`."""
    hook = getattr(module, "_hf_hook", None)  # of accelerate, which offloads them; see [`hooked_device`]
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether this very module was compiled, by `module.compile()` or by `torch.compile(module)`."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def layers_alike(by_layer: bool) -> Iterator[None]:
    """
    Meanwhile layers that are compiled one by one are one function: torch would compile each again for its number, up
    to a limit of 8, and tells in its messages how not to.
    """
    if not by_layer:
        yield
        return
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        yield


@contextmanager
def without_checkpointing(module: torch.nn.Module) -> Iterator[None]:
    """
    Gradient checkpointing off meanwhile: checkpointed layers take no cache, which compressing and generating need. A
    pass without gradients has nothing to save by it.
    """
    checkpointed = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False) is True]
    for part in checkpointed:
        setattr(part, "gradient_checkpointing", False)  # noqa: B010
    try:
        yield
    finally:
        for part in checkpointed:
            setattr(part, "gradient_checkpointing", True)  # noqa: B010


__all__ = ["awake", "execution_device", "hooked_device", "is_compiled", "layers_alike", "without_checkpointing"]
