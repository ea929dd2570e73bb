"""The thin library under the numbered experiments.

Axes, as they are named in every shape of this package:

    batch      prompts run together                 d_model   residual stream
    pos        token positions of a prompt          d_head    one head's queries, keys or values
    layer      blocks, 0 .. n_layers - 1            d_mlp     MLP neurons
    depth      residual states, 0 .. n_layers:      d_vocab   vocabulary
               0 is the embedding, l + 1 the        head      query heads
               output of block l                    kv_head   key/value heads (fewer in GQA)

Who may import whom (tests/test_layout.py lists every module's place): what works on arrays, text
and files < what touches a model < the run and what is made of it.

`from lens_utils import lens` gives a module that is loaded when it is first used, so that a run.py
can name what it needs at its top and still answer `--help` without waiting for torch.
"""

import importlib
from pathlib import Path
from types import ModuleType


class _WhenUsed(ModuleType):
    """Stands for a module of this package until one of its names is asked for."""

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(self.__name__), name)


def __getattr__(name: str) -> ModuleType:
    if not Path(__file__).with_name(f"{name}.py").exists():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    full = f"{__name__}.{name}"
    # viz gives every figure its look from the moment it is imported, so it does not wait.
    return importlib.import_module(full) if name == "viz" else _WhenUsed(full)
