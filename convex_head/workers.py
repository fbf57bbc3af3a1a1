"""Independent tasks on several processes, one thread each: small networks gain nothing from more threads.

A task is a picklable function of one argument, ``report``; what it reports and returns arrives as events. A
task can wait for another one by name. Processes rather than threads, because attacks reseed global random
state. With ``jobs=1`` everything runs in the calling process, in the same order, with the same events and on
one thread too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from convex_head.errors import ConvexHeadError

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Task:
    """``function(report)`` under a unique name; it starts once the task ``after`` has succeeded."""

    name: str
    function: Callable[[Report], Any]
    after: str | None = None


@dataclass(frozen=True)
class Event:
    """What happened to a task.

    Attributes:
        task: its name.
        kind: "start", "progress", "done", or "failed" (also when the task before it failed).
        fraction: of the task that is done, for "progress".
        text: what it does now, or one line on what went wrong.
        value: what it returned, for "done".
        details: the traceback, for "failed".
    """

    task: str
    kind: str
    fraction: float = 0.0
    text: str = ""
    value: Any = None
    details: str = ""


Listener = Callable[[Event], None]


def run_tasks(tasks: Sequence[Task], jobs: int, listener: Listener) -> None:
    """Run all tasks; a failed task is an event, and the others go on.

    Args:
        tasks: with unique names; ``after`` names an earlier task. Earlier tasks start first.
        jobs: processes; 1 stays in this one.
        listener: gets every event, in this process. An exception that it raises, or an interrupt, stops all.
    """
    if jobs <= 1:
        _run_here(tasks, listener)
    else:
        with contextlib.ExitStack() as stack:
            _Pool(tasks, min(jobs, len(tasks)), partial(_Worker, stack), listener).run()


def _run_here(tasks: Sequence[Task], listener: Listener) -> None:
    failed: set[str] = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task in tasks:
            if task.after in failed:
                event = _not_started(task)
            else:
                listener(Event(task.name, "start"))
                event = _perform(task, listener)
            if event.kind == "failed":
                failed.add(task.name)
            listener(event)
    finally:
        torch.set_num_threads(threads)


def _perform(task: Task, listener: Listener) -> Event:
    def report(fraction: float, text: str) -> None:
        listener(Event(task.name, "progress", fraction, text))

    try:
        return Event(task.name, "done", 1.0, value=task.function(report))
    except Exception as error:
        line = str(error) if isinstance(error, ConvexHeadError) else f"{type(error).__name__}: {error}"
        return Event(task.name, "failed", text=line, details=traceback.format_exc())


def _not_started(task: Task) -> Event:
    return Event(task.name, "failed", text=f"not started, because {task.after} failed")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a process has started; the process inherits that it is blocked."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    caught: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, previous)
    if caught and callable(previous):
        previous(*caught[0])


class _Worker:
    """A process that performs one task after another; it ends when the stack closes."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        # A fork of a process that has run torch operations can hang: spawn.
        context = multiprocessing.get_context("spawn")
        self.connection, remote = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(remote,), daemon=True)
        with _undisturbed():
            self.process.start()
        remote.close()
        self.task: Task | None = None
        stack.callback(self._stop)

    def _stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """The worker's loop: receive a task, send its events. The parent alone reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        connection.send(_perform(connection.recv(), connection.send))


class _Pool:
    """Hands waiting tasks to idle workers until none is left; a process starts once there is a task for it."""

    def __init__(self, tasks: Sequence[Task], jobs: int, start: Callable[[], _Worker], listener: Listener) -> None:
        self.waiting = list(tasks)
        self.workers: list[_Worker] = []
        self.jobs = jobs
        self.start = start
        self.listener = listener
        self.done: set[str] = set()
        self.failed: set[str] = set()

    def run(self) -> None:
        self._assign()
        while busy := {worker.connection: worker for worker in self.workers if worker.task}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                self._handle(worker, self._receive(worker))
            self._assign()

    def _receive(self, worker: _Worker) -> Event:
        assert worker.task is not None
        try:
            event: Event = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            text = f"its process ended with exit code {worker.process.exitcode}; is there enough memory?"
            self.workers.remove(worker)
            self.jobs -= 1  # not replaced: what killed it would kill the next one
            return Event(worker.task.name, "failed", text=text)
        return event

    def _handle(self, worker: _Worker, event: Event) -> None:
        if event.kind != "progress":
            (self.done if event.kind == "done" else self.failed).add(event.task)
            worker.task = None
        self.listener(event)

    def _assign(self) -> None:
        for task in list(self.waiting):
            if task.after in self.failed:
                self.waiting.remove(task)
                self.failed.add(task.name)
                self.listener(_not_started(task))
        if not self.jobs:
            for task in self.waiting:
                self.listener(Event(task.name, "failed", text="not started, because no process is left"))
            self.waiting.clear()
        for task in [task for task in self.waiting if task.after is None or task.after in self.done]:
            worker = self._idle()
            if worker is None:
                return
            worker.task = task
            self.waiting.remove(task)
            self.listener(Event(task.name, "start"))
            worker.connection.send(task)

    def _idle(self) -> _Worker | None:
        """A worker without a task; a new one while fewer than ``jobs`` run; else None."""
        for worker in self.workers:
            if worker.task is None:
                return worker
        if len(self.workers) == self.jobs:
            return None
        self.workers.append(self.start())
        return self.workers[-1]
