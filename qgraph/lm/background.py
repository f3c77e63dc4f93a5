"""Programs made in a thread of their own, while the model itself answers."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from .form import Form
from .programs import Program

Then = Callable[[Program], Any]
"""What is done with a program before anybody gets it: it is tried and compared."""


class Library:
    """The programs of a model by form.

    >>> from qgraph.lm.form import Form
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
        work = [(form, future, then) for form, then, future, mine in claimed if mine]
        if work:
            thread = threading.Thread(
                target=self._work, args=(work,), daemon=True, name="qgraph.lm"
            )
            _threads.add(thread)
            thread.start()

    def _claim(self, form: Form) -> tuple[Future[Program], bool]:
        """The form's program to come, and whether it is ours to make."""
        with self._lock:
            found = self._futures.get(form)
            if found is None:
                found = self._futures[form] = Future()
                return found, True
            return found, False

    def _work(self, work: Sequence[tuple[Form, Future[Program], Then]]) -> None:
        for form, future, then in work:
            self._fulfil(form, future, then)

    def _fulfil(self, form: Form, future: Future[Program], then: Then | None) -> None:
        try:
            program = self._make(form)
            if then is not None and program.executable is not None and not _leaving.is_set():
                then(program)
            future.set_result(program)
        except BaseException as error:  # interrupted: who waits is told, and the next one tries
            with self._lock:
                self._futures.pop(form, None)
            future.set_exception(error)
            raise


_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_leaving = threading.Event()


def settled(timeout: float = 60.0) -> None:
    """Wait until nothing is being made.

    Python ends while threads compute, and what they hold of MLX would be gone under them.
    """
    for thread in list(_threads):
        thread.join(timeout)


def _leave() -> None:
    _leaving.set()
    settled()


atexit.register(_leave)
