"""Programs made in a thread of their own, before a call needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from .programs import Form, Program


class Library:
    """The programs of a model by form; one that is being made is waited for.

    >>> from qgraph.lm.programs import Form
    >>> form = Form(1, 1, False, (), (), (), ())
    >>> library = Library(lambda form: Program(form, reason="an example"))
    >>> library.prepare(form)
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

    def _claim(self, form: Form) -> tuple[Future[Program], bool]:
        """The form's program to come, and whether it is ours to make."""
        with self._lock:
            found = self._futures.get(form)
            if found is None:
                found = self._futures[form] = Future()
                return found, True
            return found, False

    def get(self, form: Form) -> Program:
        future, mine = self._claim(form)
        if mine:
            self._fulfil(form, future)
        return future.result()

    def _fulfil(self, form: Form, future: Future[Program]) -> None:
        try:
            future.set_result(self._make(form))
        except BaseException as error:  # interrupted: who waits is told, and the next one tries
            del self._futures[form]
            future.set_exception(error)
            raise

    def prepare(self, form: Form) -> None:
        """Begin to make the program, if nobody has."""
        future, mine = self._claim(form)
        if mine:
            work = threading.Thread(target=self._fulfil, args=(form, future), daemon=True)
            work.start()
