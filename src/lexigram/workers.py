"""Workers: independent tasks run in this process, in others of this machine, or on a cluster, with the same bytes from each.

joblib's backends start the processes and reach the clusters; here is what stands before them: how many tasks there are at once,
one thread a task, who hears Ctrl-C, and what is said where a worker is lost. Nothing here knows what a task is.

`joblib.Parallel` is only asked to open a backend. Its own loop reads as many tasks ahead as there are workers, takes them in a
thread that is not the caller's, and gives no results as they come on Ray; so tasks are submitted here one by one.
"""

import importlib
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from types import ModuleType, TracebackType
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from joblib import Parallel, effective_n_jobs, parallel_config
from joblib.parallel import BatchedCalls, get_active_backend

from lexigram.errors import LexigramError
from lexigram.memory import peak_memory_bytes

Backend = Literal["loky", "ray", "dask"]

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 1
"""Tasks that wait, ready, while every worker has one."""

HEARTBEAT = 5.0
"""Seconds without a result after which a cluster is looked at again."""

_ADDRESSES = {"ray": "RAY_ADDRESS", "dask": "DASK_SCHEDULER_ADDRESS"}


def never() -> bool:
    """The `stop` of who wants all results."""
    return False


class Workers:
    """So many processes at work on tasks that do not depend on each other; a context, which none of them outlives.

    A task has one thread of torch wherever it runs, because sums depend on how many threads share them: so results are the same
    bytes for every `count` and backend, on processors of one kind. One worker of the backend ``loky`` is this process. Its
    other workers hear no Ctrl-C, which a terminal sends to all processes: what it means is for this one to decide. They are
    those of joblib in this process, so only one such context is open at a time, and none are started where joblib starts none:
    in a daemonic process, or in a thread of another parallel loop; tasks then run in this process, and joblib warns. A script
    that opens it needs no ``if __name__ == "__main__"``.

    Args:
        count: tasks that run at once.
        backend: ``loky``, processes of this machine, or the joblib backend of a running Ray or Dask cluster, whose nodes need
            lexigram installed.
        address: of the cluster, ``host:port``; else that in ``RAY_ADDRESS`` or ``DASK_SCHEDULER_ADDRESS``.
        patience: seconds until a cluster that does not answer, or has no free worker, is an error.

    Raises:
        LexigramError: on entering, where the workers cannot be had.
    """

    def __init__(
        self, count: int = 1, backend: Backend = "loky", address: str | None = None, *, patience: float = 30.0
    ) -> None:
        if count < 1:
            raise LexigramError(f"the number of workers is {count}; ask for 1 or more")
        if backend not in _OPENERS:
            raise LexigramError(f"there is no backend {backend!r}; choose among {', '.join(_OPENERS)}")
        if backend == "loky" and address is not None:
            raise LexigramError(
                f"the address {address!r} is of no use to loky; choose the backend ray or dask, or leave it out"
            )
        self.count, self.backend, self.address, self.patience = count, backend, address, patience
        self._stack = ExitStack()
        self._pool: _Pool | None = None
        self.peak_memory_bytes = 0
        """The largest resident set of any other process that has ended a task of this one."""

    def __enter__(self) -> "Workers":
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def run(self, function: Callable[[T], R], tasks: Iterable[T], *, stop: Callable[[], bool] = never) -> Iterator[R]:
        """The results of all tasks as they come, in no order; one such iterator at a time.

        At most `count` + `AHEAD` tasks, and results not taken yet, exist at once; in this process one. `tasks` and `stop` are
        called in the thread of the caller. Where the iterator ends early, by an error or because it is closed, tasks that still
        run are killed, or given up on a cluster; the next call starts new workers.

        Args:
            function: of one task; both, and what it returns, have to be picklable unless `count` is 1.
            tasks: taken one by one.
            stop: asked before each; once it says yes, what was begun is finished and no task is taken any more.

        Raises:
            LexigramError: where a worker is lost or a cluster does not answer any more.
            Exception: what `function` raises, as it is, or as the nearest of its base classes that can be sent.
        """
        pool = self._open()
        results: SimpleQueue[Any] = SimpleQueue()
        awaited = 0
        try:
            waiting = _until(stop, tasks)
            while True:
                for job in (_Job(function, task) for task in islice(waiting, pool.room - awaited)):
                    with _interrupts_held():  # processes and threads that begin here inherit the mask
                        pool.submit(job, results.put)
                    awaited += 1
                    del job  # the task with it, before the next is made
                if not awaited:
                    return
                outcome = self._next(pool, results)
                awaited -= 1
                self.peak_memory_bytes = max(self.peak_memory_bytes, outcome.peak)
                yield outcome.taken()
        finally:
            if awaited:
                self._close()

    def _next(self, pool: "_Pool", results: "SimpleQueue[Any]") -> "_Outcome":
        """What the next task that ends came to."""
        while True:
            try:
                found = results.get(timeout=HEARTBEAT)
            except Empty:
                pool.check()
                continue
            try:
                outcome = pool.outcome(found)
            except Exception as error:
                raise self._lost(error) from error
            if not isinstance(outcome, _Outcome):  # a cluster's own word on a task that it dropped
                raise self._lost(outcome)
            return outcome

    def _lost(self, reason: object) -> LexigramError:
        """What to raise where a worker did not bring its task to an end."""
        said = _first_sentence(reason)
        if isinstance(reason, pickle.PicklingError):
            return LexigramError(f"a task cannot be sent to the workers: {said}; use one worker")
        return LexigramError(
            f"a worker was lost ({said}): it was killed, or its memory did not suffice; "
            f"use fewer workers than {self.count}, or more memory, and run again"
        )

    def _open(self) -> "_Pool":
        if self._pool is None:
            with ExitStack() as stack:
                self._pool = stack.enter_context(_OPENERS[self.backend](self.count, self.address, self.patience))
                self._stack = stack.pop_all()
        return self._pool

    def _close(self) -> None:
        self._pool = None
        self._stack.close()


class _Outcome(NamedTuple):
    """What came of a task: its value, or the error that its function raised; from a worker the traceback in words, and the
    peak of its memory in bytes.
    """

    value: Any = None
    error: Exception | None = None
    trace: str | None = None
    peak: int = 0

    def taken(self) -> Any:
        """The value, or the error raised once more."""
        if self.error is None:
            return self.value
        if self.trace is None:
            raise self.error
        raise self.error from _WorkerTracebackError(self.trace)


class _WorkerTracebackError(Exception):
    """Where in a worker an error was raised; tracebacks themselves cannot be sent."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


class _Job(Generic[T, R]):
    """A task with its function, as it is sent to a worker.

    It holds the task as an attribute, not as an argument, which the clusters' backends would keep for later calls.
    """

    def __init__(self, function: Callable[[T], R], task: T) -> None:
        self.function, self.task = function, task

    def here(self) -> _Outcome:
        """Run in this process, whose number of threads comes back afterwards."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _Outcome(self.function(self.task))
        except Exception as error:
            return _Outcome(error=error)
        finally:
            torch.set_num_threads(threads)

    def __call__(self) -> _Outcome:
        """Run in a worker.

        Its threads stay at one: the tasks of a Dask worker are threads of one process, and MKL has one number for all of them.
        """
        torch.set_num_threads(1)
        try:
            value = self.function(self.task)
            return _Outcome(value, peak=peak_memory_bytes())
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            return _Outcome(error=_portable(error), trace=trace)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives pickling, or its message as the nearest of its base classes that does."""
    for kind in type(error).__mro__:
        try:
            candidate = error if kind is type(error) else kind(str(error))
            if type(pickle.loads(pickle.dumps(candidate))) is kind:
                return candidate
        except Exception:  # whatever the class raises where a message alone does not make one
            continue
    raise AssertionError(f"{type(error).__name__} is no exception")


def _until(stop: Callable[[], bool], tasks: Iterable[T]) -> Iterator[T]:
    """The tasks until `stop` says yes, which is asked before each is made."""
    source = iter(tasks)
    while not stop():
        try:
            yield next(source)
        except StopIteration:
            return


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """SIGINT blocked in this thread: a process or thread that is started in the meantime has it blocked for good."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pool(Protocol):
    """What runs jobs: here, or through a backend of joblib."""

    room: int
    """Jobs that it may have at once."""

    def submit(self, job: _Job[Any, Any], done: Callable[[Any], None]) -> None:
        """Begin a job; `done` is called, in whatever thread, with what `outcome` understands."""

    def outcome(self, found: Any) -> Any:
        """The outcome of a job that is done; whatever the backend raises where there is none."""

    def check(self) -> None:
        """Raise LexigramError where nothing will ever be done."""


class _Here:
    """This process."""

    room = 1

    def submit(self, job: _Job[Any, Any], done: Callable[[Any], None]) -> None:
        done(job.here())

    def outcome(self, found: Any) -> Any:
        return found

    def check(self) -> None:
        pass


class _Processes:
    """A backend of joblib that notices by itself when a worker is lost: loky, Ray."""

    def __init__(self, backend: Any, room: int) -> None:
        self.backend, self.room = backend, room

    def submit(self, job: _Job[Any, Any], done: Callable[[Any], None]) -> None:
        self.backend.submit(self._call(job), done)

    def outcome(self, found: Any) -> Any:
        (outcome,) = self.backend.retrieve_result_callback(found)
        return outcome

    def check(self) -> None:
        pass

    def _call(self, job: _Job[Any, Any]) -> BatchedCalls:
        return BatchedCalls([(job, (), {})], self.backend.get_nested_backend())


class _Dask(_Processes):
    """joblib's Dask backend; it does not call back where a worker is lost, and waits for ever where none is left."""

    def __init__(self, backend: Any, room: int, patience: float) -> None:
        super().__init__(backend, room)
        self.patience = patience
        self.seen = time.monotonic()

    def submit(self, job: _Job[Any, Any], done: Callable[[Any], None]) -> None:
        self.seen = time.monotonic()
        self.backend.submit(self._call(job), lambda _: None).add_done_callback(done)

    def outcome(self, found: Any) -> Any:
        return super().outcome(found.result())

    def check(self) -> None:
        client = self.backend.client
        if client.status == "running" and client.nthreads():
            self.seen = time.monotonic()
        elif time.monotonic() - self.seen > self.patience:
            raise LexigramError(
                f"the dask cluster has had no worker for {self.patience:.0f} seconds; start workers, and run again"
            )


@contextmanager
def _opened(name: Backend, count: int, **options: Any) -> Iterator[Any]:
    """joblib's backend of a name with its workers, and none of them afterwards."""
    with parallel_config(backend=name, **options):
        backend, _ = get_active_backend()
    with Parallel(n_jobs=count, backend=backend, max_nbytes=None):
        backend.start_call()
        try:
            yield backend
        finally:
            backend.stop_call()
            backend.abort_everything(ensure_ready=False)


@contextmanager
def _open_loky(count: int, address: str | None, patience: float) -> Iterator[_Pool]:
    if _startable(count) == 1:
        yield _Here()
        return
    resource_tracker.ensure_running()  # else loky starts it among the workers, and it unblocks SIGINT
    options = {"inner_max_num_threads": 1, "initializer": _end_with, "initargs": (os.getpid(),)}
    with _opened("loky", count, **options) as backend:
        yield _Processes(backend, count + AHEAD)


def _startable(count: int) -> int:
    """How many of `count` processes joblib starts here: one, with a warning, in a daemon or a thread of a parallel loop."""
    with parallel_config(backend="loky"):
        return int(effective_n_jobs(count))


def _end_with(parent: int) -> None:
    """Let this process end soon after its parent, which may be killed without a word."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _open_ray(count: int, address: str | None, patience: float) -> Iterator[_Pool]:
    """Actors that take a core each. Its pool hands jobs to them in turn, so one more waits than there are actors."""
    ray = _package("ray", "ray")
    if count == 1:  # joblib would run the tasks in this process
        raise LexigramError("the backend ray needs 2 workers or more; for one, leave the backend out")
    importlib.import_module("ray.util.joblib").register_ray()
    with ExitStack() as stack:
        if not ray.is_initialized():
            where = _reachable("ray", address, patience)
            try:
                ray.init(address=where, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                raise _unreachable("ray", where, error) from error
            stack.callback(ray.shutdown)
        deadline = time.monotonic() + patience
        while (free := ray.available_resources().get("CPU", 0)) < count:
            if time.monotonic() > deadline:
                raise LexigramError(
                    f"the ray cluster has {free:.0f} free cores, too few for {count} workers; use fewer, or add nodes"
                )
            time.sleep(0.2)
        pool = {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
        yield _Processes(stack.enter_context(_opened("ray", count, ray_remote_args=pool)), count + AHEAD)


@contextmanager
def _open_dask(count: int, address: str | None, patience: float) -> Iterator[_Pool]:
    """Its scheduler runs at once what it is given, so nothing is sent ahead."""
    distributed, dask = _package("dask", "distributed"), _package("dask", "dask")
    where = _reachable("dask", address, patience)
    # A task is sent as part of the graph, so that the cluster can run it again; it is meant to be large.
    with ExitStack() as stack, dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
        try:
            # Its own time limit does not hold where something listens that is no scheduler.
            made = _in_time(patience, lambda: distributed.Client(where, timeout=patience, set_as_default=False))
            client = stack.enter_context(made)
            backend = _opened("dask", count, client=client, wait_for_workers_timeout=patience)
            pool = _Dask(stack.enter_context(backend), count, patience)
        except (OSError, RuntimeError, ValueError) as error:
            raise _unreachable("dask", where, error) from error
        yield pool


_OPENERS = {"loky": _open_loky, "ray": _open_ray, "dask": _open_dask}


def _package(backend: str, name: str) -> ModuleType:
    """A package that only this backend needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LexigramError(
            f"the backend {backend} needs the package {name}, which is not installed; pip install 'lexigram[cluster]'"
        ) from error


def _reachable(backend: str, address: str | None, patience: float) -> str:
    """The address of the cluster, where something answers: the packages themselves would try for minutes."""
    where = address or os.environ.get(_ADDRESSES[backend])
    if not where:
        raise LexigramError(
            f"the backend {backend} needs a running cluster; name its address, host:port, or set {_ADDRESSES[backend]}"
        )
    try:
        parts = urlsplit(where if "://" in where else f"//{where}")
        if not parts.hostname or not parts.port:
            raise ValueError("it is not of the form host:port")
        socket.create_connection((parts.hostname, parts.port), timeout=patience).close()
    except (OSError, ValueError) as error:
        raise _unreachable(backend, where, error) from error
    return where


def _in_time(seconds: float, make: Callable[[], R]) -> R:
    """What `make` gives, in a thread that is left behind where that takes longer.

    Raises:
        TimeoutError: where it does.
        Exception: what `make` raises.
    """
    made: Future[R] = Future()

    def attempt() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    if not wait([made], timeout=seconds).done:
        raise TimeoutError(f"it does not answer within {seconds:.0f} seconds")
    return made.result()


def _unreachable(backend: str, where: str, error: Exception) -> LexigramError:
    said = _first_sentence(error)
    return LexigramError(
        f"the {backend} cluster at {where!r} cannot be used: {said}; start it and its workers, or name another"
    )


def _first_sentence(reason: object) -> str:
    """What an error says, without advice that is meant for programs."""
    return str(reason).strip().partition("\n")[0].partition(". ")[0].rstrip(".") or type(reason).__name__
