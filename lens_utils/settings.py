"""The settings that every experiment has, and the command line that is derived from them."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from lens_utils.errors import BadInput

Config = TypeVar("Config", bound="BaseConfig")


@dataclass(frozen=True)
class BaseConfig:
    """The settings that every experiment has."""

    model: str = "smol"
    """A name from `./lab models`, a hub id, a folder, a .gguf file or a checkpoint (@revision)."""
    seed: int = 0
    """Seed of every random choice."""
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    """auto takes cuda, else mps if it agrees with the cpu, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is float32 below 2 billion parameters, bfloat16 above."""
    quick: bool = False
    """The small size: minutes on two cores."""
    tag: str = ""
    """Added to the run folder's name, to keep runs with other settings apart."""
    fresh: bool = False
    """Throw away what this run's folder holds and start over."""
    shard: str = ""
    """i/n computes every n-th part, starting with part i (0 <= i < n); the last one assembles."""

    SHORT: ClassVar[dict[str, str]] = {}
    """Short flags and what they stand for, such as --raw for --lens=raw."""

    @property
    def variant(self) -> str:
        """The run folder's name. Raises BadInput for a tag that would lead out of its place."""
        if not self.tag.isprintable() or "/" in self.tag:
            raise BadInput(f"--tag {self.tag!r} cannot be part of a folder's name")
        path = Path(self.model).expanduser()
        name = path.resolve().name if path.exists() else self.model.replace("/", "--")
        return "-".join(filter(None, (name, "quick" if self.quick else "", self.tag)))

    @property
    def part_of(self) -> tuple[int, int]:
        """(i, n) of --shard; (0, 1) without one."""
        if not self.shard:
            return 0, 1
        i, _, n = self.shard.partition("/")
        if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise BadInput(f"--shard {self.shard}: write it as i/n with 0 <= i < n, such as 0/8")
        return int(i), int(n)

    @property
    def lasting(self) -> dict[str, Any]:
        """What the results depend on, as JSON has it: all but how the work is gone about."""
        held = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("fresh", "shard")}
        return json.loads(json.dumps(held, default=str))


def configure(config: type[Config], main: Callable, source: Path, args: list[str]) -> Config:
    """An experiment's settings from command-line arguments; exits with 2 on a wrong one."""
    import tyro

    args = [config.SHORT.get(arg, arg) for arg in args]
    text = (sys.modules[main.__module__].__doc__ or "").strip()
    return tyro.cli(config, args=args, prog=f"./lab run {source.parent.name[:3]}", description=text)
