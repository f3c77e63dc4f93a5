"""Programs made in a thread of their own, while the model itself answers."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from ...runtime.regions.cuda.order import leave
from .form import Form
from .maker import Program

Then = Callable[[Program], Any]
"""What is done with a program before anybody gets it: it is tried and compared."""


class Library:
    """The programs of a model by form.

    >>> from qgraph.lm.programs.form import Form
    >>> form = Form(1, 1, False, (), (), (), ())
    >>> library = Library(lambda form: Program(form, reason="an example"))
    >>> library.prepare([(form, lambda program: None)])
    >>> library.get(form).reason
    'an example'
    """

    def __init__(self, make: Callable[[Form], Program]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._futures: dict[Form, Future[Program]] = {}

    @property
    def programs(self) -> list[Program]:
        """Those that are made."""
        return [f.result() for f in list(self._futures.values()) if f.done()]

    def ready(self, form: Form) -> Program | None:
        future = self._futures.get(form)
        return future.result() if future is not None and future.done() else None

    def get(self, form: Form) -> Program:
        """The program, made here and now if nobody has begun to."""
        future, mine = self._claim(form)
        if mine:
            self._fulfil(form, future, None)
        return future.result()

    def prepare(self, wanted: Sequence[tuple[Form, Then]]) -> None:
        """Begin to make the programs that nobody has begun, one after the other."""
        claimed = [(form, then, *self._claim(form)) for form, then in wanted]
        for form, then, future, mine in claimed:
            if mine:
                WORKER.do(partial(self._fulfil, form, future, then))

    def _claim(self, form: Form) -> tuple[Future[Program], bool]:
        """The form's program to come, and whether it is ours to make."""
        with self._lock:
            found = self._futures.get(form)
            if found is None:
                found = self._futures[form] = Future()
                return found, True
            return found, False

    def _fulfil(self, form: Form, future: Future[Program], then: Then | None) -> None:
        try:
            program = self._make(form)
            if then is not None and program.executable is not None and not WORKER.leaving:
                then(program)
            future.set_result(program)
        except BaseException as error:  # interrupted: who waits is told, and the next one tries
            with self._lock:
                self._futures.pop(form, None)
            future.set_exception(error)
            raise


class Worker:
    """One thread, for as long as Python runs, that does one thing after the other.

    It never ends.  A thread that used MLX destroys objects of Python when it ends, after `join` has
    returned; if Python is at its own end by then, the process is aborted (mlx 0.32.4).

    Attributes:
        leaving: is Python about to end?  What is not begun is left undone.
    """

    def __init__(self) -> None:
        self.leaving = False
        self._waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Condition()
        self._count = 0
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], None]) -> None:
        with self._idle:
            self._count += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, daemon=True, name="qgraph.lm")
                self._thread.start()
                atexit.register(self.leave)
        self._waiting.put(job)

    def _loop(self) -> None:
        while True:
            job = self._waiting.get()
            try:
                if not self.leaving:
                    job()
            except Exception:  # who waits for the program has been told
                pass
            finally:
                del job
                leave()  # else who calls programs would wait for each, in turn with this thread
                with self._idle:
                    self._count -= 1
                    self._idle.notify_all()

    def settle(self, timeout: float) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._count == 0, timeout)

    def leave(self) -> None:
        """What is under way ends first: Python's end would take MLX away from under it."""
        self.leaving = True
        self.settle(60.0)


WORKER = Worker()


def settled(timeout: float = 60.0) -> None:
    """Wait until nothing is being made."""
    WORKER.settle(timeout)
