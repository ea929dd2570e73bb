"""The experiment contract: settings, the run folder, stages, parts and the manifest.

A run is a folder, outputs/NNN_name/<model>[-quick][-tag]/. Whatever it holds was written whole by
a named stage and is recorded with its sha256 in manifest.json; a result without a record does not
exist. A run that was killed is taken up again by the same command and ends in the same bytes.
What results rest on (settings, prompts, weights, another experiment's tables) is recorded too,
and a run that would mix two of them is refused.
"""

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from lens_utils import console, files, provenance
from lens_utils.console import guarded, say
from lens_utils.errors import BadInput, Failure, Unfinished
from lens_utils.results import Results as Results  # notebooks take it from here
from lens_utils.results import read_manifest, runs
from lens_utils.settings import BaseConfig, configure

if TYPE_CHECKING:
    from lens_utils.models import LoadedModel

T = TypeVar("T")


class Run:
    """One run folder: loads what it holds, computes and records what it lacks."""

    def __init__(self, source: Path, cfg: BaseConfig) -> None:
        self.experiment = source.parent.name
        self.cfg = cfg
        self.folder = provenance.outputs() / self.experiment / cfg.variant
        self._code = provenance.code_sha(source.parent)
        self._models: dict[str, LoadedModel] = {}
        self._settings = cfg.lasting
        prompts = source.parent / "prompts.json"
        if prompts.exists():
            self._settings["prompts.json"] = files.sha256(prompts)[:12]
        if cfg.part_of != (0, 1) and cfg.fresh:
            raise BadInput("--fresh with --shard would delete the other shards' parts: "
                           "start over with --fresh alone, then run the shards")  # fmt: skip
        if cfg.fresh and self.folder.exists():
            old = self.folder.with_name(f".{self.folder.name}-{time.time_ns()}")
            self.folder.rename(old)  # at once: a kill leaves nothing that looks like a run
            (old / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(old)
        self._open()

    # The manifest

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """One process at a time; says so when another one is at it."""
        lock = FileLock(self.folder / f".{what.replace('/', '-')}.lock")
        try:
            held = lock.acquire(timeout=2)
        except Timeout:
            say(f"{self.experiment}: another process is at {what}; waiting for it")
            held = lock.acquire()
        with held:
            yield

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(f"cannot make {self.folder}: {error.strerror}") from None
        with self._alone("manifest"):
            manifest = read_manifest(self.folder)
            parts = self.folder / "parts"
            if not manifest:
                shutil.rmtree(parts, ignore_errors=True)  # of whatever settings
            if not (manifest and manifest["stages"]) and not any(parts.glob("*/*")):
                manifest = {
                    "experiment": self.experiment,
                    "variant": self.cfg.variant,
                    "settings": self._settings,
                    "quick": self.cfg.quick,
                    "tag": self.cfg.tag,
                    **provenance.environment(),
                    "code": self._code,
                    "models": {},
                    "upstream": {},
                    "stages": {},
                }
                files.write(self.folder / "manifest.json", manifest)
                return
        self._same("other settings", manifest["settings"], self._settings)
        if {manifest["code"], *(s["code"] for s in manifest["stages"].values())} != {self._code}:
            say(f"{self.experiment}: the code changed since these results were computed "
                "(--fresh computes them again)")  # fmt: skip

    def _same(self, what: str, held: dict[str, Any], new: dict[str, Any]) -> None:
        """Refuse to go on in a folder whose results rest on something else."""
        changed = [f"{key} {held.get(key)} -> {new.get(key)}"
                   for key in {**held, **new} if held.get(key) != new.get(key)]  # fmt: skip
        if changed:
            raise BadInput(
                f"{provenance.shown(self.folder)} holds results for {what}: "
                f"{', '.join(changed)}. Keep both with --tag NAME, or start over with --fresh."
            )

    @contextlib.contextmanager
    def _recording(self) -> Iterator[dict[str, Any]]:
        """The manifest to change; one process at a time, written whole."""
        with self._alone("manifest"):
            manifest = read_manifest(self.folder)
            if manifest.get("settings") != self._settings:
                raise BadInput(f"{provenance.shown(self.folder)} was started over by another "
                               "process; this one stops")  # fmt: skip
            before = json.dumps(manifest)
            yield manifest
            if json.dumps(manifest) != before:
                files.write(self.folder / "manifest.json", manifest)

    def _rests_on(self, group: str, name: str, identity: dict[str, Any]) -> None:
        """Record a model or an upstream table; a second time it has to be the same one."""
        with self._recording() as manifest:
            self._same(f"another {name}", manifest[group].setdefault(name, identity), identity)

    # Stages and parts

    def _holds(self, name: str) -> bool:
        path, record = self.folder / name, read_manifest(self.folder).get("stages", {}).get(name)
        if record is None or not path.exists():
            return False
        if files.sha256(path) == record["sha256"]:
            return True
        say(f"{provenance.shown(path)} is damaged: computed again")
        path.unlink()
        return False

    def _keep(self, name: str, value: Any, seconds: float) -> None:
        """Write and record a stage. Where it comes out otherwise than before, later ones go."""
        path = self.folder / name
        files.write(path, value)
        entry = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
        with self._recording() as manifest:
            stages = manifest["stages"]
            if name in stages and stages[name]["sha256"] != entry["sha256"]:
                for later in list(stages)[list(stages).index(name) + 1 :]:
                    del stages[later]
                for folder in (self.folder / "parts").glob("*"):
                    if folder.name not in stages:
                        shutil.rmtree(folder)
            stages[name] = entry | {"seconds": round(seconds, 2), "code": self._code}

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """The file `name` of this run: read if it is there whole, else computed and written.

        Formats by suffix (`files`). When a damaged stage comes out otherwise than before, every
        later stage is computed again. Of several processes one computes, the others wait for it.
        """
        with self._alone(name):
            if not self._holds(name):
                start = time.perf_counter()
                value = compute()
                self._keep(name, value, time.perf_counter() - start)
            return files.read(self.folder / name)

    def chunks(
        self, name: str, items: Sequence[T], size: int, compute: Callable[[Sequence[T]], Any]
    ) -> Any:
        """The file `name`, computed `size` items at a time; each part is kept on disk.

        `compute` returns a frame, or a dict of tensors whose first axis runs over items. A killed
        run skips the parts it has. With --shard i/n only every n-th part is computed here.
        Raises Unfinished when parts of other shards are still missing.
        """
        with self._alone(name):
            if self._holds(name):
                return files.read(self.folder / name)
        if len(items) == 0:
            raise BadInput(f"{self.experiment}: nothing is left to compute {name} from")
        start = time.perf_counter()
        i, n = self.cfg.part_of
        spans = [(at, min(at + size, len(items))) for at in range(0, len(items), size)]
        missing = [span for span in spans[i::n] if self._part(name, span, len(items)) is None]
        for at, end in self.track(missing, name) if missing else ():
            part = compute(items[at:end])
            with self._recording():  # only while the folder is still this run's
                files.write_digested(self._place(name, (at, end), len(items)), part)
        with self._alone(name):
            if not self._holds(name):
                paths = [self._part(name, span, len(items)) for span in spans]
                if gaps := paths.count(None):
                    raise Unfinished(f"{name}: this shard is done, {gaps} of {len(spans)} parts "
                                     "are missing")  # fmt: skip
                whole = _joined([files.read(path) for path in paths if path])
                self._keep(name, whole, time.perf_counter() - start)
            return files.read(self.folder / name)

    def _place(self, name: str, span: tuple[int, int], total: int) -> Path:
        suffix = ".safetensors" if name.endswith(".safetensors") else ".parquet"
        return self.folder / "parts" / name / f"{span[0]:06d}-{span[1]:06d}of{total:06d}{suffix}"

    def _part(self, name: str, span: tuple[int, int], total: int) -> Path | None:
        """A part that is there whole. Damaged ones stay: another process may be mending them."""
        whole, damaged = files.find_digested(self._place(name, span, total))
        if damaged and not whole:
            say(f"{provenance.shown(damaged[0])} is damaged: computed again")
        return whole

    def upstream(self, experiment: str, name: str, model: str = "") -> Any:
        """A stage of another experiment for the same model (or the one named), at the same size,
        with this run's tag or without one."""
        path, record = self._upstream(experiment, name, model)
        identity = {"run": path.relative_to(provenance.outputs() / experiment).parts[0],
                    "sha256": record["sha256"][:12]}  # fmt: skip
        place = f"{experiment}/{name}" + (f"@{model}" if model else "")
        self._rests_on("upstream", place, identity)
        return files.read(path)

    def upstream_folder(self, experiment: str, name: str, model: str = "") -> Path:
        """The run folder whose stage `upstream` reads: for files that the stage is a record of."""
        path, _ = self._upstream(experiment, name, model)
        return path.parents[name.count("/")]

    def _upstream(self, experiment: str, name: str, model: str) -> tuple[Path, dict[str, Any]]:
        own = dataclasses.replace(self.cfg, model=model or self.cfg.model)
        for cfg in (own, dataclasses.replace(own, tag="")):
            folder = provenance.outputs() / experiment / cfg.variant
            record = read_manifest(folder).get("stages", {}).get(name)
            path = folder / name
            if record and path.exists() and files.sha256(path) == record["sha256"]:
                return path, record
        quick = " --quick" if self.cfg.quick else ""
        raise BadInput(f"{self.experiment} reads {name} of {experiment}, which is not there: "
                       f"./lab run {experiment[:3]} --model {own.model}{quick}")  # fmt: skip

    def models_of(self, experiment: str) -> list[str]:
        """Models with a finished run of an experiment at this size and without a tag, by name."""
        finished = [r.manifest["settings"] for r in runs(provenance.outputs() / experiment)
                    if r.finished]  # fmt: skip
        return [s["model"] for s in finished if s["quick"] == self.cfg.quick and not s["tag"]]

    @property
    def done(self) -> bool:
        """Whether summary.json, the last stage, and all before it are there whole, of this code,
        and rest on tables of other experiments that are still the same."""
        manifest = read_manifest(self.folder)
        stages, outputs = manifest["stages"], provenance.outputs()
        for table, held in manifest["upstream"].items():
            experiment, _, name = table.partition("@")[0].partition("/")
            now = read_manifest(outputs / experiment / held["run"]).get("stages", {}).get(name, {})
            if not now.get("sha256", "").startswith(held["sha256"]):
                return False
        return "summary.json" in stages and all(
            stage["code"] == self._code and self._holds(name) for name, stage in stages.items()
        )

    def leave_nothing(self) -> None:
        """Take the folder away if nothing was computed in it: it would look like a run."""
        manifest, parts = read_manifest(self.folder), (self.folder / "parts").glob("*/*")
        if self.cfg.part_of == (0, 1) and not manifest.get("stages") and not any(parts):
            shutil.rmtree(self.folder, ignore_errors=True)

    # While it runs

    def model(
        self,
        random_init: bool = False,
        fold: bool = False,
        other: str = "",
        n_head: int | None = None,
        activation: str | None = None,
    ) -> "LoadedModel":
        """This run's model (or the `other` one), loaded once and named in the manifest; or its
        untrained twin. n_head and activation: for a checkpoint that does not say them."""
        name = ("untrained twin" if random_init else "model") + (", folded" if fold else "")
        name += f" of {other}" if other else ""
        if name not in self._models:
            from lens_utils.models import load_model

            cfg = self.cfg
            seed = cfg.seed if random_init else None
            model = other or cfg.model
            told = {"n_head": n_head, "activation": activation}
            loaded = load_model(model, cfg.device, cfg.dtype, init_seed=seed, fold=fold, **told)
            self._rests_on("models", name, loaded.identity)
            self._models[name] = loaded
        return self._models[name]

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items, with a progress bar (terminal, notebook) or plain lines (job log)."""
        return console.track(items, f"{self.experiment[:3]} {what}")


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        import torch

        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    import pandas as pd

    return pd.concat(parts, ignore_index=True)


def launch(config: type[BaseConfig], main: Callable[[Any, Run], None]) -> None:
    """The last line of every run.py: settings from the command line, then `main`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's time limit, as Ctrl-C
    source = Path(sys.modules[main.__module__].__file__ or "").resolve()
    raise SystemExit(guarded(lambda: execute(config, main, source, sys.argv[1:])))


def execute(
    config: type[BaseConfig], main: Callable[[Any, Run], None], source: Path, args: list[str]
) -> Run:
    """Run one experiment on command-line arguments; its Run afterwards."""
    cfg = configure(config, main, source, args)
    run = Run(source, cfg)
    if not run.done:
        try:
            main(cfg, run)
        except BadInput:  # such as a model that is not here
            run.leave_nothing()
            raise
    return run
