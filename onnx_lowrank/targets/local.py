"""Targets of this machine: the execution providers of the installed ONNX Runtime and its plugins.

Nothing falls back silently: a provider that is not there is an error before anything runs, the
assignment of the nodes is read back from every session, and every model is really run, because a
session that builds may still fail, crash or answer with NaN.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.assignment import assignment, assignment_text, nodes_elsewhere
from onnx_lowrank.runtime.finite import all_finite, not_finite
from onnx_lowrank.runtime.plugins import (
    PLUGINS,
    Plugin,
    install_command,
    no_use,
    plugin_version,
    software_gpu,
)
from onnx_lowrank.targets.base import (
    Job,
    Offer,
    Outcome,
    Target,
)
from onnx_lowrank.targets.setup import packages

if TYPE_CHECKING:
    import onnxruntime as ort

    from onnx_lowrank.progress import Advance
    from onnx_lowrank.runtime.providers import Provider
    from onnx_lowrank.runtime.session import OrtLog

__all__ = ["EmulatedTarget", "LocalTarget", "create", "offers", "probe", "refusal"]


class LocalTarget(Target):
    """An execution provider of this process."""

    def __init__(self, name: str, provider: Provider) -> None:
        super().__init__(name)
        self.provider = provider
        self.own = provider.full

    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """See `Target.run`; peak memory is measured in a process for each model."""
        from onnx_lowrank.runtime.log import OrtLog

        if not feeds:
            raise InputError(f"{self.name}: expected at least one sample, got none")
        if self.emulated:
            job = dataclasses.replace(job, iterations=0)
        work = _Work(self, job, feeds, advance, OrtLog())
        entries = [work.begin(model) for model in models]
        work.time([entry for entry in entries if entry.session is not None])
        return tuple(entry.outcome() for entry in entries)


class EmulatedTarget(LocalTarget):
    """An execution provider that does not run on its own hardware here."""

    emulated: ClassVar[bool] = True


@dataclass(eq=False)
class _Entry:
    """What is known of one model so far."""

    model: Path
    session: ort.InferenceSession | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: str) -> _Entry:
        self.known["error"] = " ".join(error.split())
        self.session = None
        return self

    def outcome(self) -> Outcome:
        return Outcome(**self.known)


class _Work:
    """One job on one provider."""

    def __init__(
        self, target: LocalTarget, job: Job, feeds: Sequence[Feed], advance: Advance, log: OrtLog
    ) -> None:
        from onnx_lowrank.runtime.session import default_threads

        self.target, self.provider, self.job = target, target.provider, job
        self.feeds, self.advance, self.log = feeds, advance, log
        self.threads = job.threads or default_threads()
        self.end = None if job.seconds is None else time.monotonic() + job.seconds

    def begin(self, model: Path) -> _Entry:
        """Load and run a model; everything but the timing."""
        entry = _Entry(model)
        entry.known["half"] = self.provider.half
        try:
            self._begin(entry)
        except InputError as error:
            entry.fail(str(error))
        return entry

    def _begin(self, entry: _Entry) -> None:
        from onnx_lowrank.runtime.providers import CPU
        from onnx_lowrank.runtime.rehearsal import rehearse
        from onnx_lowrank.runtime.session import run
        from onnx_lowrank.targets.memory import measure_peak

        model, name = entry.model, entry.model.name
        if self.job.iterations or self.provider is not CPU:
            # Also where no memory is asked for: a provider that crashes must not take us along.
            peak = measure_peak(
                model, self.provider.name, self.feeds[0], self.threads, self._seconds_left()
            )
            if peak.crash is not None:
                raise InputError(f"{name}: {peak.crash} on {self.provider.full}")
            if not self.target.emulated:  # the emulator's own memory is of no interest
                entry.known["peak_bytes"] = peak.bytes
        else:
            rehearse(model, self.feeds[0], what=name, threads=self.threads)
        start = time.perf_counter_ns()
        entry.session = self._open(entry)
        loaded = time.perf_counter_ns()
        with self.log.capture("running"):
            outputs = [run(entry.session, self.feeds[0], name)]
            ran = time.perf_counter_ns()
            for feed in self.feeds[1:] if self.job.outputs else ():
                self._check_time(name)
                outputs.append(run(entry.session, feed, name))
                self.advance(1)
        self.advance(1)
        if not self.target.emulated:
            entry.known |= {"load_ns": loaded - start, "first_ns": ran - loaded}
        if self.provider is not CPU:
            self._require_finite(model, outputs)
        if self.job.outputs:
            entry.known["outputs"] = tuple(outputs)
        if self.job.threads is not None and self.provider.device is not None:
            entry.known["notes"] = (
                f"the number of threads applies to ONNX Runtime; {self.provider.title} chooses its "
                "own",
            )
        if self.provider.name == "qnn":
            entry.known["costs"] = self._context(model)

    def _open(self, entry: _Entry) -> ort.InferenceSession:
        """A session whose nodes are known, on the provider alone where that is asked for."""
        try:
            session = self._session(entry.model, strict=self.job.strict)
        except InputError as error:
            if not self.job.strict:
                raise
            # Which nodes it is about is only told by a session that may fall back.
            nodes = assignment(self._session(entry.model, strict=False))
            if nodes is None or not nodes_elsewhere(nodes, self.provider.full):
                raise
            entry.known["nodes"] = nodes
            text = assignment_text(nodes, self.provider.full, self.provider.title)
            raise InputError(
                f"{entry.model.name}: {named('strict', True)} wants every node there: {text}"
            ) from (error)
        entry.known["nodes"] = assignment(session)
        return session

    def _session(
        self, model: Path, *, strict: bool, entries: Mapping[str, str] | None = None
    ) -> ort.InferenceSession:
        from onnx_lowrank.runtime.session import open_session

        return open_session(
            model,
            provider=self.provider,
            threads=self.threads,
            strict=strict,
            entries=entries,
            log=self.log,
        )

    def _require_finite(self, model: Path, outputs: Sequence[Feed]) -> None:
        """Refuse NaN and Inf where the CPU gives numbers."""
        if all(all_finite(row) for row in outputs):
            return
        from onnx_lowrank.runtime.session import open_session, run

        cpu = open_session(model, threads=self.threads, log=self.log)
        for feed, found in zip(self.feeds, outputs, strict=False):
            with self.log.capture("running"):
                expected = run(cpu, feed, f"{model.name} on the CPU")
            why = not_finite(found, expected)
            if why is not None:
                raise InputError(f"{model.name}: {self.provider.full} runs it and {why}")

    def _context(self, model: Path) -> dict[str, float]:
        """Bytes of the compiled context, which are the same on every machine."""
        import onnx

        from onnx_lowrank.files import workspace

        with workspace(None) as folder:
            path = folder / "context.onnx"
            entries = {
                "ep.context_enable": "1",
                "ep.context_file_path": str(path),
                "ep.context_embed_mode": "1",
            }
            try:
                self._session(model, strict=False, entries=entries)
                graph = onnx.load(path).graph
            except (InputError, OSError):  # no node is on the provider: there is no context
                return {}
        sizes = [
            len(item.s)
            for node in graph.node
            if node.op_type == "EPContext"
            for item in node.attribute
            if item.name == "ep_cache_context"
        ]
        return {"context_bytes": float(sum(sizes))} if sizes else {}

    def time(self, entries: Sequence[_Entry]) -> None:
        """Time the models in turns, where that is asked for."""
        if not self.job.iterations or not entries:
            return
        from onnx_lowrank.runtime.session import prepare
        from onnx_lowrank.runtime.timing import MOST_FEEDS, interleave

        sessions = [entry.session for entry in entries if entry.session is not None]
        used = [self.feeds[index] for index in range(min(len(self.feeds), MOST_FEEDS))]
        calls: list[list[Callable[[], Any]]] = [
            [prepare(session, feed) for session in sessions] for feed in used
        ]
        with self.log.capture("running"):
            rounds = interleave(
                calls,
                rounds=self.job.iterations,
                warmup=self.job.warmup,
                seconds=self._seconds_left(),
                progress=lambda _: self.advance(1),
            )
        for entry, times in zip(entries, zip(*rounds, strict=True), strict=True):
            entry.known["times_ns"] = times

    def _seconds_left(self) -> float | None:
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def _check_time(self, name: str) -> None:
        if self.end is not None and time.monotonic() >= self.end:
            raise InputError(f"{name}: not done within {self.job.seconds:g} s")


def create(name: str) -> Target | None:
    """The target of an execution provider; None where the name is none.

    Raises:
        InputError: a plugin that is not installed or offers no device.
    """
    from onnx_lowrank.runtime.log import OrtLog
    from onnx_lowrank.runtime.providers import provider_of

    with OrtLog().capture("registering"):
        provider = provider_of(name)
    if provider is None:
        return None
    return (EmulatedTarget if provider.emulated else LocalTarget)(name, provider)


def offers() -> list[Offer]:
    """The CPU, what else the installed ONNX Runtime has, and the plugins."""
    return [*_built_in_offers(), *(_plugin_offer(plugin) for plugin in PLUGINS.values())]


def _built_in_offers() -> Iterator[Offer]:
    import onnxruntime as ort

    from onnx_lowrank.runtime.providers import CPU, built_in

    for name in built_in():
        where = "built into the installed onnxruntime"
        if name == CPU.name:
            yield Offer(name, True, ort.__version__, where, "real", None)
            continue
        why = refusal(name)
        yield Offer(name, why is None, ort.__version__, why or where, "real", None)


def _plugin_offer(plugin: Plugin) -> Offer:
    found = plugin_version(plugin)
    times = "emulated" if plugin.emulated else "real"
    if found is None:
        absent, useless = f"{plugin.package} is not installed", no_use(plugin)
        if useless is not None:
            absent += f", and would not help: {useless}"
        command = install_command(plugin.name) if useless is None else None
        return Offer(plugin.name, False, None, absent, times, command)
    why = refusal(plugin.name)
    if why is not None:  # the package is there: to install it again would not help
        return Offer(plugin.name, False, found, why, times, _driver(plugin))
    where = f"plugin {plugin.package}"
    if plugin.emulated:
        driver = software_gpu() if plugin.name == "webgpu" else None
        where += ", an emulator" if driver is None else f", on SwiftShader ({driver})"
    return Offer(plugin.name, True, found, where, times, None)


def _driver(plugin: Plugin) -> str | None:
    """The command for a device in software, where a plugin that is there has none to run on."""
    return packages("chromium") if plugin.name == "webgpu" and software_gpu() is None else None


def refusal(name: str) -> str | None:
    """Why no session can be opened on a provider; None if one can."""
    from onnx_lowrank.runtime.log import OrtLog
    from onnx_lowrank.runtime.providers import resolve_provider
    from onnx_lowrank.runtime.rehearsal import attempt
    from onnx_lowrank.runtime.session import open_session

    model, log = probe(), OrtLog()
    feed = {"x": np.ones((1, 4), np.float32)}
    try:
        # In a child first: a driver that crashes must not take the list with it.
        if attempt(model, feed, what="the smallest model", provider=name, threads=1) is None:
            return None
        with log.capture("trying"):
            open_session(model, provider=resolve_provider(name), threads=1, log=log)
    except InputError as error:
        return str(error)
    return None


def probe() -> bytes:
    """The smallest model that is worth a session: y[1, 4] = x[1, 4] @ W[4, 4]."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"], name="probe")],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor("W", TensorProto.FLOAT, [4, 4], [0.0] * 16)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())
