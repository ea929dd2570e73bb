"""One formula, two ways to run it: on whole tensors, or on numbers inside one compiled loop.

Array operations pass over memory once each. A formula of a hundred of them on millions of small
items waits for memory, not for arithmetic, and a compiled loop (numba) that keeps an item in
registers is 10 to 30 times faster. Such a formula is written once, from arithmetic, `torch.log`,
`torch.where`, `torch.minimum` and `torch.maximum`, which where they are compiled stand for those
of numbers.
Branches and booleans keep the compiler from taking several items at once; these do not.
"""

import inspect
import math
from collections.abc import Callable

import numba
import torch
from jaxtyping import Shaped
from numba.extending import overload
from torch import Tensor

overload(torch.log)(lambda number: lambda number: math.log(number))
overload(torch.where)(lambda condition, one, other: lambda condition, one, other:
                      one if condition else other)  # fmt: skip
overload(torch.minimum)(lambda one, other: lambda one, other: one if one < other else other)
overload(torch.maximum)(lambda one, other: lambda one, other: one if one > other else other)


def inlined(*functions: Callable) -> None:
    """Let compiled loops call these functions, each call replaced by the function itself."""
    for function in functions:
        bare = inspect.unwrap(function)  # without the checks of shapes that tests put around it
        options = {"forceinline": True, "error_model": "numpy"}
        overload(function, strict=False, jit_options=options)(lambda *_, bare=bare, **__: bare)


def loop(function: Callable) -> Callable:
    """The function compiled: sums in any order, x / y as x times 1 / y, and 1 / 0 infinite."""
    fast = {"reassoc", "contract", "nsz", "arcp"}
    return numba.njit(fastmath=fast, error_model="numpy")(inspect.unwrap(function))


def fits(tensor: Shaped[Tensor, "..."]) -> bool:
    """Whether compiled loops can run on it: on a CPU."""
    return tensor.device.type == "cpu"
