"""What the tests of the engine share."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    """Names of the engine's operators that a block of code calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rebnn":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))
