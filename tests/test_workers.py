"""Workers: the same bytes from this process, from others and from clusters, within memory, and nothing left behind.

What the tests of bytes run are real fits; the oracle is the same call in this process. Starting workers takes seconds, so only
one test with two of them is not slow.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from joblib import Parallel, delayed
from torch import Tensor

from conftest import Command, toy_folder
from drawn import correlated, generator, gram_of, normal
from lexigram import workers
from lexigram.errors import LexigramError
from lexigram.methods import (
    Budget,
    BudgetTooSmallError,
    CospadiConfig,
    Member,
    MethodConfig,
    SparseGptConfig,
    SvdConfig,
    fit_group,
    layout_group,
)
from lexigram.workers import AHEAD, Backend, Workers

SIZES = [(96, 64), (64, 64), (48, 64), (160, 64)]
CONFIGS = [CospadiConfig(), SvdConfig(), SparseGptConfig()]


class FitTask(NamedTuple):
    name: str
    config: MethodConfig
    member: Member


class Made(NamedTuple):
    name: str
    factors: dict[str, Tensor]
    objective: list[float]
    threads: int
    where: str


@cache
def fit_tasks() -> list[FitTask]:
    """Made once: what a task is given is the caller's, with as many threads as it has."""
    gram = gram_of(correlated(width=64))
    return [
        FitTask(f"{config.name} {shape}", config, Member(normal(*shape, seed=seed), gram))
        for config in CONFIGS
        for seed, shape in enumerate(SIZES)
    ]


def fit_task(task: FitTask) -> Made:
    shape = tuple(task.member.weight.shape)
    spec = layout_group(task.config, [shape], Budget(shape[0] * shape[1]), "shared")
    ((factor, report),) = fit_group(task.config, [task.member], spec, generator(3)).members
    return Made(task.name, factor.state_dict(), report.objective, torch.get_num_threads(), node())


def node() -> str:
    """The node of a Ray cluster, or the process."""
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else str(os.getpid())


def fitted(count: int, backend: Backend = "loky", address: str | None = None) -> dict[str, Made]:
    with Workers(count, backend, address) as pool:
        return {made.name: made for made in pool.run(fit_task, fit_tasks())}


def check_same_bytes(found: dict[str, Made], wanted: dict[str, Made]) -> None:
    assert found.keys() == wanted.keys()
    for name, made in wanted.items():
        assert found[name].objective == made.objective
        assert found[name].factors.keys() == made.factors.keys()
        for key, tensor in made.factors.items():
            assert found[name].factors[key].dtype == tensor.dtype
            assert torch.equal(found[name].factors[key], tensor), f"{name} {key}"
        assert found[name].threads == 1


@pytest.fixture(scope="module")
def here() -> dict[str, Made]:
    """What this process makes, with two threads for what is not a task."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = fitted(1)
        assert torch.get_num_threads() == 2
        return found
    finally:
        torch.set_num_threads(threads)


def loky_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "popen_loky_posix" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def gone(process: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether it stops being true in time."""
    deadline = time.monotonic() + seconds
    while process():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# One worker: this process.


def test_one_worker_is_this_process_with_one_thread(here: dict[str, Made]) -> None:
    assert {made.where for made in here.values()} == {str(os.getpid())}
    assert {made.threads for made in here.values()} == {1}
    assert len(here) == len(CONFIGS) * len(SIZES)


class Heavy:
    """A task that can be counted."""

    def __init__(self, number: int) -> None:
        self.number = number


def number_of(heavy: Heavy) -> int:
    time.sleep(0.05)
    return heavy.number


def counted(total: int, alive: "weakref.WeakSet[Heavy]", most: list[int]) -> Iterator[Heavy]:
    for number in range(total):
        gc.collect()
        most.append(len(alive) + 1)
        task = Heavy(number)
        alive.add(task)
        yield task
        del task


def check_memory_and_stop(pool: Workers, room: int) -> None:
    alive: weakref.WeakSet[Heavy] = weakref.WeakSet()
    most: list[int] = []
    assert sorted(pool.run(number_of, counted(9, alive, most))) == list(range(9))
    assert max(most) <= room
    results: list[int] = []
    for result in pool.run(number_of, counted(9, alive, taken := []), stop=lambda: len(results) >= 3):
        results.append(result)
    assert 3 <= len(results) == len(taken) <= 3 + room, "what was begun is finished, and nothing else is taken"


@pytest.mark.slow
def test_one_task_at_a_time_until_stop_says_yes() -> None:
    with Workers() as pool:
        check_memory_and_stop(pool, 1)


def test_nothing_is_taken_where_stop_says_yes_at_once() -> None:
    with Workers() as pool:
        tasks = iter(range(3))
        assert list(pool.run(abs, tasks, stop=lambda: True)) == []
        assert next(tasks) == 0


def meet(task: tuple[Path, int]) -> int:
    """This process's number, once so many processes have come here."""
    folder, count = task
    (folder / str(os.getpid())).touch()
    for _ in range(600):
        if len(list(folder.iterdir())) >= count:
            return os.getpid()
        time.sleep(0.1)
    raise TimeoutError(f"{count} processes did not meet")


def refused(number: int) -> int:
    if number == 0:
        return 0
    if number == 1:
        raise LexigramError("the weight is odd; take another")
    if number == 2:
        raise BudgetTooSmallError(10, Budget(5))
    raise ValueError("not finite") from KeyError("inner")


def test_errors_of_this_process_are_themselves() -> None:
    with Workers() as pool:
        with pytest.raises(BudgetTooSmallError) as small:
            list(pool.run(refused, [0, 2]))
        assert small.value.needed == 10
        with pytest.raises(ValueError, match="not finite") as wrong:
            list(pool.run(refused, [3]))
        assert isinstance(wrong.value.__cause__, KeyError)


def test_an_error_while_a_task_is_made_is_itself() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise OSError("the shard is gone")

    with Workers() as pool, pytest.raises(OSError, match="shard"):
        list(pool.run(abs, tasks()))


# What a user can mend.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "number of workers is 0"),
        ({"backend": "threads"}, "'threads'; choose among loky, ray, dask"),
        ({"count": 2, "address": "host:1"}, "'host:1' is of no use to loky"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LexigramError, match=message):
        Workers(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_package_that_is_missing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "dask", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LexigramError, match=r"not installed; pip install 'lexigram\[cluster\]'"):
        Workers(2, backend, "127.0.0.1:1").__enter__()


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_that_nobody_named_or_that_does_not_answer(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "distributed"):
        pytest.importorskip(name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(LexigramError, match="name its address"):
        Workers(2, backend).__enter__()
    with pytest.raises(LexigramError, match="'nowhere' cannot be used: it is not of the form host:port"):
        Workers(2, backend, "nowhere").__enter__()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(LexigramError, match=f"'127.0.0.1:{port}' cannot be used: .*refused; start it"):
        Workers(2, backend, f"127.0.0.1:{port}").__enter__()
    assert time.monotonic() - begun < 10


def test_what_listens_but_is_no_dask_scheduler_is_given_up() -> None:
    pytest.importorskip("distributed")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        pool = Workers(2, "dask", f"tcp://127.0.0.1:{mute.getsockname()[1]}", patience=1.0)
        with pytest.raises(LexigramError, match="cannot be used"):
            pool.__enter__()


def test_ray_with_one_worker() -> None:
    pytest.importorskip("ray")
    with pytest.raises(LexigramError, match="2 workers or more"):
        Workers(1, "ray", "127.0.0.1:1").__enter__()


# Processes of this machine.


@pytest.mark.slow
def test_two_workers_give_the_same_bytes_within_memory(here: dict[str, Made], tmp_path: Path) -> None:
    with Workers(2) as pool:
        found = {made.name: made for made in pool.run(fit_task, fit_tasks())}
        check_same_bytes(found, here)
        assert str(os.getpid()) not in {made.where for made in found.values()}
        assert len(set(pool.run(meet, [(tmp_path, 2)] * 2))) == 2, "both at work at once"
        check_memory_and_stop(pool, 2 + AHEAD)
        with pytest.raises(LexigramError, match="the weight is odd") as odd:
            list(pool.run(refused, [0, 1]))
        assert "in refused" in str(odd.value.__cause__), "where in the worker"
    assert gone(loky_processes)


@pytest.mark.slow
def test_three_workers_give_the_same_bytes(here: dict[str, Made]) -> None:
    check_same_bytes(fitted(3), here)


@pytest.mark.slow
def test_an_error_that_cannot_be_sent_comes_as_its_base_class() -> None:
    with Workers(2) as pool, pytest.raises(ValueError, match="a budget of 5 bytes is too small") as error:
        list(pool.run(refused, [2]))
    assert type(error.value) is ValueError


@pytest.mark.slow
def test_a_task_that_cannot_be_sent_is_said_to_be() -> None:
    with Workers(2) as pool, pytest.raises(LexigramError, match=r"cannot be sent to the workers.*use one worker"):
        list(pool.run(id, [threading.Lock()]))


def killed(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return number


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_is_an_error_and_others_follow_it() -> None:
    with Workers(2) as pool:
        with pytest.raises(LexigramError, match=r"a worker was lost.*use fewer workers than 2"):
            list(pool.run(killed, range(6)))
        assert gone(loky_processes)
        assert sorted(pool.run(killed, [2, 3])) == [2, 3]
    assert gone(loky_processes)


@pytest.mark.slow
def test_an_iterator_that_is_closed_leaves_no_process() -> None:
    with Workers(2) as pool:
        results = pool.run(time.sleep, [0.0, 300.0, 300.0])
        next(results)
        results.close()
        assert gone(loky_processes)
    assert gone(loky_processes)


@pytest.mark.slow
def test_a_parent_that_fails_leaves_no_process() -> None:
    def fail() -> None:
        with Workers(2) as pool:
            for _ in pool.run(time.sleep, [0.0, 300.0, 300.0]):
                raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        fail()
    assert gone(loky_processes)


def interrupted(number: int) -> int:
    time.sleep(0.3)
    return number


@pytest.mark.slow
def test_workers_hear_no_interrupt_not_even_while_they_start() -> None:
    hit: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(6):
            for process in loky_processes():
                process.send_signal(signal.SIGINT)
                hit.append(process.pid)
            yield number

    with Workers(2) as pool:
        assert sorted(pool.run(interrupted, tasks())) == list(range(6))
    assert len(set(hit)) == 2


@pytest.mark.slow
def test_this_process_hears_the_interrupt_and_what_was_begun_is_finished() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))

    def tasks() -> Iterator[int]:
        for number in range(9):
            yield number
            if number == 4:
                os.kill(os.getpid(), signal.SIGINT)

    try:
        with Workers(2) as pool:
            found = sorted(pool.run(interrupted, tasks(), stop=lambda: bool(heard)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    assert found in (list(range(5)), list(range(6)))


UNGUARDED = """
from lexigram.workers import Workers
print("once", flush=True)
with Workers(2) as pool:
    print(sorted(pool.run(abs, [-1, -2, -3])))
"""


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Workers do not run it once more, as those of multiprocessing's spawn would."""
    script = tmp_path / "plain.py"
    script.write_text(UNGUARDED)
    ended = subprocess.run(
        [sys.executable, script], env=with_tests_on_path(), capture_output=True, text=True, check=False, timeout=100
    )
    assert ended.stdout.splitlines() == ["once", "[1, 2, 3]"], ended.stderr


def two_workers(_task: int) -> list[int]:
    """The processes that two workers and this one are."""
    with pytest.warns(UserWarning, match="setting n_jobs=1"), Workers(2) as pool:
        return sorted({os.getpid(), *pool.run(pid_after, [0.0, 0.0])})


def test_where_no_process_may_be_started_tasks_run_in_this_one() -> None:
    """Daemons may have no children; joblib starts none from threads of its own."""
    with get_context("fork").Pool(1) as daemons:
        assert [len(pids) for pids in daemons.map(two_workers, [0])] == [1]
    assert Parallel(n_jobs=2, backend="threading")([delayed(two_workers)(0)]) == [[os.getpid()]]


KILLED_PARENT = """
import os, signal, time
from lexigram.workers import Workers
from test_workers import pid_after
if __name__ == "__main__":
    with Workers(2) as pool:
        results = pool.run(pid_after, [0.5, 0.5, 300.0, 300.0])
        print(next(results), next(results), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(KILLED_PARENT)
    ended = subprocess.run([sys.executable, script], env=with_tests_on_path(), stdout=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    assert gone(lambda: [pid for pid in pids if psutil.pid_exists(pid)])


# Clusters of two nodes on this machine.


def with_tests_on_path() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


@pytest.fixture
def dask_cluster() -> Iterator[str]:
    """A scheduler and two workers of two threads each, with as many BLAS threads as they like."""
    pytest.importorskip("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {key: value for key, value in with_tests_on_path().items() if key != "OMP_NUM_THREADS"}
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--host", "127.0.0.1", "--port", address.split(":")[1], "--no-dashboard"]
    worker = [*dask, "worker", f"tcp://{address}", "--nthreads", "2", "--no-nanny", "--no-dashboard"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in (scheduler, worker, worker):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, env=environment, **quiet))
        gone(lambda: not answers(address), 60)
        yield address
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two nodes of one core each, that tell nobody of themselves."""
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    for name, value in with_tests_on_path().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    cluster = cluster_utils.Cluster()
    try:
        cluster.add_node(**node)
        cluster.add_node(**node)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dask_gives_the_same_bytes_from_two_nodes(here: dict[str, Made], dask_cluster: str) -> None:
    with Workers(2, "dask", dask_cluster) as pool:
        found = {made.name: made for made in pool.run(fit_task, fit_tasks())}
        check_same_bytes(found, here)
        assert len({made.where for made in found.values()} - {str(os.getpid())}) == 2
        check_memory_and_stop(pool, 2 + AHEAD)
        with pytest.raises(LexigramError, match="the weight is odd"):
            list(pool.run(refused, [0, 1]))
        assert list(pool.run(abs, [-4])) == [4]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dask_cluster_that_loses_all_workers(dask_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HEARTBEAT", 0.2)
    with Workers(2, "dask", dask_cluster, patience=15.0) as pool:
        assert sorted(pool.run(abs, [-4, 5])) == [4, 5]
        with pytest.raises(LexigramError, match="had no worker for"):
            list(pool.run(killed, range(6)))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_gives_the_same_bytes_from_two_nodes(here: dict[str, Made], ray_cluster: str) -> None:
    with Workers(2, "ray", ray_cluster, patience=5.0) as pool:
        found = {made.name: made for made in pool.run(fit_task, fit_tasks())}
        check_same_bytes(found, here)
        assert len({made.where for made in found.values()}) == 2
        check_memory_and_stop(pool, 2 + AHEAD)
        with pytest.raises(LexigramError, match="the weight is odd"):
            list(pool.run(refused, [0, 1]))
        with pytest.raises(LexigramError, match="a worker was lost"):
            list(pool.run(killed, range(6)))
        assert list(pool.run(abs, [-4])) == [4]
    with pytest.raises(LexigramError, match="2 free cores, too few for 3 workers"):
        Workers(3, "ray", ray_cluster, patience=1.0).__enter__()


def check_the_command_gives_the_same_bytes(
    backend: Backend, address: str, command: Command, words: Path, tmp_path: Path
) -> None:
    """`compress` in this process, and on the cluster."""
    model = toy_folder(tmp_path / "model", "llama")
    args = ["compress", model, "--method", "svd", "--allocation", "knapsack", "--ratio", 0.4]
    args += ["-c", words, "--sequences", 4, "--length", 32]
    for out, more in (("here", ["--workers", 1]), ("there", ["--backend", backend, "--address", address])):
        said = command(*args, "--out", tmp_path / out, *more)
        assert said.code == 0, said.error
    here, there = ((tmp_path / out / "lexigram.safetensors").read_bytes() for out in ("here", "there"))
    assert here == there
    peak = json.loads((tmp_path / "there" / "run.json").read_text())["workers_peak_memory_bytes"]
    assert 10**8 < peak < 10**10


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_on_a_dask_cluster(command: Command, dask_cluster: str, words: Path, tmp_path: Path) -> None:
    check_the_command_gives_the_same_bytes("dask", dask_cluster, command, words, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_on_a_ray_cluster(command: Command, ray_cluster: str, words: Path, tmp_path: Path) -> None:
    check_the_command_gives_the_same_bytes("ray", ray_cluster, command, words, tmp_path)
