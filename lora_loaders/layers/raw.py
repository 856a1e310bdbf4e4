"""A raw parameter seen as a layer: what has a weight can carry adapters, and a module's own parameter is a weight."""

from torch import nn


class RawParameter(nn.Module):
    """A parameter that a module reads itself (`scale_shift_table`), with the face of a base layer.

    Args:
        owner: the module whose parameter it is.
        name: the parameter's name in its owner.
    """

    bias = None

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple it is no submodule
        self._name = name

    @property
    def is_transposed(self) -> bool:
        """Whether its owner stacks weights of experts as `[experts, in, out]`, as some of transformers' modules do."""
        return bool(getattr(self._owner[0], "is_transposed", False))

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = self._owner[0]._parameters[self._name]
        assert parameter is not None
        return parameter


def raw_parameter(owner: nn.Module, name: str) -> RawParameter | None:
    """The owner's parameter of this name as a layer; None where it has none that holds floating numbers."""
    parameter = dict(owner.named_parameters(recurse=False)).get(name)
    return RawParameter(owner, name) if parameter is not None and parameter.is_floating_point() else None
