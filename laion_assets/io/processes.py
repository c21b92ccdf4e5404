"""Share work among processes, where the threads of one would wait for its interpreter.

Each process is a new one that runs this module: a copy of this process (`fork`) could inherit the locks
of threads that it does not have, and the start methods of `multiprocessing` run the user's script again.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from laion_assets.io.errors import InputError
from laion_assets.io.parallel import one_thread
from laion_assets.io.spill import file_of

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MAPPED_BYTES = 1 << 20  # larger arrays are mapped by all processes, and not copied to each
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def in_processes(work: Callable[[Argument], Result], arguments: Sequence[Argument]) -> list[Result]:
    """Call `work` with each argument in a process of its own, which computes in one thread.

    The processes end with this one, however it ends.

    Args:
        work: a function of a module.
        arguments: what pickle can write. Large arrays take memory only where a process changes them,
            which no other sees.

    Returns:
        The results in the order of the arguments.

    Raises:
        InputError: a process was killed, probably because memory ran out, or the disk is full.
        RuntimeError: a process ended in another way.
        Exception: any error of `work`, with a note that says where it was raised.

    """
    with ExitStack() as stack:
        files = _Files(stack)
        jobs = [files.pickled((work, argument)) for argument in arguments]
        processes = [stack.enter_context(_process(files.descriptors)) for _ in jobs]
        for process, job in zip(processes, jobs, strict=True):
            with suppress(ConnectionError):  # it has ended, which is found below
                process.connection.send_bytes(job)
        place = {process.connection: number for number, process in enumerate(processes)}
        results = {}
        while place:
            for ready in wait(place):
                number = place.pop(ready)  # type: ignore[call-overload]
                results[number] = processes[number].result()
        return [results[number] for number in range(len(jobs))]


@dataclass(frozen=True)
class _Process:
    """A process that works, and the connection to it."""

    process: subprocess.Popen[bytes]
    connection: Connection

    def result(self) -> Any:
        """Return what `work` returned, or raise what it raised."""
        try:
            succeeded, result = pickle.loads(self.connection.recv_bytes())  # noqa: S301
        except (EOFError, ConnectionError):
            code = self.process.wait()
            ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            ended = f"a process that shared the work of this one has ended ({ending})"
            if code == -signal.SIGKILL:  # by the kernel
                remedy = "give this step more memory, or fewer cores (OMP_NUM_THREADS)"
                raise InputError(f"{ended}: {remedy}") from None
            raise RuntimeError(f"{ended}; what it printed may say why") from None
        if succeeded:
            return result
        raise result


@contextmanager
def _process(descriptors: Sequence[int]) -> Iterator[_Process]:
    ours, theirs = Pipe()
    with ours, theirs:
        path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__,  # what libraries print
            pass_fds=[theirs.fileno(), *descriptors],
            env={**os.environ, **ALONE, "PYTHONPATH": path},
        )
        theirs.close()
        try:
            yield _Process(process, ours)
        finally:
            process.kill()
            process.wait()


class _Files:
    """Files of large arrays, closed with a stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[int, tuple[NDArray[Any], IO[bytes]]] = {}  # by the identity of the array

    @property
    def descriptors(self) -> list[int]:
        return [file.fileno() for _, file in self._files.values()]

    def pickled(self, content: object) -> bytes:
        """Pickle an object, with large arrays by reference."""
        sink = BytesIO()
        pickler = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = self._reference  # type: ignore[method-assign]
        pickler.dump(content)
        return sink.getvalue()

    def _reference(self, content: Any) -> tuple[int, str, tuple[int, ...]] | None:
        if type(content) is not np.ndarray or content.nbytes < MAPPED_BYTES:
            return None
        if id(content) not in self._files:
            self._files[id(content)] = content, self._stack.enter_context(file_of(content))
        return self._files[id(content)][1].fileno(), content.dtype.str, content.shape


def _mapped(reference: tuple[int, str, tuple[int, ...]]) -> NDArray[Any]:
    descriptor, dtype, shape = reference
    with open(descriptor, "rb", closefd=False) as file:
        return np.memmap(file, dtype, "c", shape=shape).view(np.ndarray)


def main() -> None:
    """Do what comes by the connection, and answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # this process ends with its parent
    connection: Connection = Connection(int(sys.argv[1]))
    job = connection.recv_bytes()
    threading.Thread(target=_end_with_parent, args=[connection], daemon=True).start()
    try:
        work, argument = _unpickled(job)
        with one_thread():
            answer = pickle.dumps((True, work(argument)))
    except Exception as error:  # the parent raises it
        error.add_note(f"in a process that shares the work:\n{traceback.format_exc()}")
        answer = _pickled(error)
    connection.send_bytes(answer)


def _unpickled(job: bytes) -> Any:
    unpickler = pickle.Unpickler(BytesIO(job))  # noqa: S301
    unpickler.persistent_load = _mapped  # type: ignore[method-assign]
    return unpickler.load()


def _pickled(error: Exception) -> bytes:
    """Pickle an error, or what it says if it does not survive that."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)  # noqa: S301
    except Exception:  # whatever the class of the error raises
        answer = pickle.dumps((False, RuntimeError("\n".join([str(error), *error.__notes__]))))
    return answer


def _end_with_parent(connection: Connection) -> None:
    connection.poll(None)  # returns when the parent ends
    os._exit(1)


if __name__ == "__main__":
    main()
