"""All processes of a measurement, and what else the machine does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from server.benching.comparison import DIRECT, SERVER
from server.benching.processes import TICKS, Child, Engine, LiteLLM, Load, Server

if TYPE_CHECKING:
    from server.benching.bench import Plan

HELD_BACK = 1
"""Tokens of a stream, by the server's default policy."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whatever is asked, and what is known of it."""

    name: str
    port: int
    child: Child | None
    """None where its processor time is not known, or does not matter."""
    held: int = 0
    """Tokens of a stream that it holds back."""

    @property
    def peer(self) -> bool:
        """It is another proxy."""
        return self.name not in (DIRECT, SERVER)


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs."""

    load: Load
    server: Server
    targets: Sequence[Target]
    children: Sequence[Child]

    def others_s(self) -> float:
        """Processor time that everything else on the machine took so far, on all cores."""
        fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]))
        idle = fields[3] + fields[4]
        # What guests took is part of what users took.
        return (sum(fields[:8]) - idle) / TICKS - sum(child.cpu_s() for child in self.children)

    def dismiss_peers(self) -> None:
        """End the other proxies: they have had their turns."""
        for target in self.targets:
            if target.peer and target.child is not None:
                target.child.close()


@contextmanager
def stage(plan: Plan, folder: Path) -> Iterator[Stage]:
    """All processes, up and answering; they end with the context. Raises BenchError where one does not come up."""
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(folder, plan.engine_port))
        server = stack.enter_context(Server(folder, engine))
        children: list[Child] = [engine, server]
        if plan.litellm is not None:
            litellm = stack.enter_context(LiteLLM(plan.litellm, folder, engine))
            children.append(litellm)
        load = stack.enter_context(Load(folder))
        children.append(load)
        server.wait()
        targets = [Target(DIRECT, engine.port, None), Target(SERVER, server.port, server, HELD_BACK)]
        if plan.litellm is not None:
            litellm.wait()
            targets.append(Target("litellm", litellm.port, litellm))
        if plan.peer_port is not None:
            targets.append(Target("peer", plan.peer_port, None))
        yield Stage(load, server, targets, children)
