"""Runs a function on p ranks of one machine, with a deadline, in worker processes that are kept for the next call.

Workers come from a fork server that has imported torch (and whatever is named in ``preload``) once: importing Megatron-Core takes
seconds, and p copies of that on a small machine take longer than the tests. Every run has its own rendezvous and process group.
A rank that raises, dies or hangs ends the run: the parent stops the workers and raises RankError naming rank and cause. Where several ranks
raise, that is the first: the others mostly raise because it did.
"""

import contextlib
import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

_preload = {"tpinv.testing.ranks": None}  # in this order


class RankError(RuntimeError):
    """A rank raised, died or missed the deadline. The message's first line names rank and error, its traceback follows."""


class RankPool:
    """Worker processes for :meth:`run`. Use as a context manager, or call :meth:`close`.

    Args:
        preload: modules that the fork server imports once. They must start no threads. Python has one fork server in a process: it imports
            what all pools name that were made before the first of them ran; later ones' workers import theirs one by one.
    """

    def __init__(self, preload: Sequence[str] = ()):
        self._context = multiprocessing.get_context("forkserver")
        _preload.update(dict.fromkeys(preload))
        self._context.set_forkserver_preload([*_preload])
        self._workers: list[tuple] = []
        weakref.finalize(self, _stop, self._workers)  # also at interpreter exit: workers are not daemons, see _start

    def run(self, function: Callable, ranks: int, *args, timeout: float = 60.0, device: str = "cpu") -> list:
        """Calls ``function(*args)`` on ranks 0 to ranks-1 of a fresh default process group; returns their results in rank order.

        On the CPU the group is gloo's. With ``device="cuda"`` rank r has GPU r modulo their number as its current one, and the group is NCCL's
        if no two ranks share a GPU, else gloo's.

        ``function`` must be importable (defined at the top level of a module); results are moved to the CPU on the way back.

        Raises:
            RankError: a rank raised, died, or the run took longer than ``timeout`` seconds.
        """
        if ranks < 1:
            raise ValueError(f"ranks={ranks} must be at least 1")
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()  # one died between runs
        while len(self._workers) < ranks:
            self._workers.append(self._start(len(self._workers)))
        with tempfile.TemporaryDirectory(prefix="tpinv-") as directory:
            for rank, (_, pipe) in enumerate(self._workers[:ranks]):
                pipe.send((function, args, rank, ranks, os.path.join(directory, "store"), timeout, device))
            try:
                return self._collect(ranks, time.monotonic() + timeout, timeout)
            except BaseException:
                self.close()  # peers of a failed rank wait in a collective that will never finish
                raise

    def _start(self, rank: int):
        here, there = self._context.Pipe()
        # Not a daemon: those may not start processes, which Megatron-Core's distributed checkpoint does.
        process = self._context.Process(target=_serve, args=(there,), name=f"tpinv-rank-{rank}")
        process.start()
        there.close()
        return process, here

    def _collect(self, ranks: int, deadline: float, timeout: float) -> list:
        results: dict[int, object] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:ranks])}
        while len(results) < ranks:
            waiting = [pipe for pipe, rank in pipes.items() if rank not in results]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [pipes[pipe] for pipe in waiting]
                raise RankError(f"ranks {late} of {ranks} did not finish within {timeout} s; ranks {sorted(results)} did")
            for pipe in ready:
                rank = pipes[pipe]
                try:
                    ok, payload = pipe.recv()
                except EOFError:
                    self._workers[rank][0].join(5)
                    raise RankError(self._deaths(ranks)) from None
                if not ok:  # a peer's lost connection may be reported before the death or error that caused it
                    deaths = self._deaths(ranks)
                    raise RankError(deaths or self._first_failure({rank: payload}, pipes, results))
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False, map_location="cpu")
        return [results[rank] for rank in range(ranks)]

    def _deaths(self, ranks: int) -> str:
        """What to say about workers that have ended; empty when all are alive (it waits 0.2 s for a death to be known)."""
        sentinels = {process.sentinel: rank for rank, (process, _) in enumerate(self._workers[:ranks])}
        dead = sorted(sentinels[s] for s in multiprocessing.connection.wait(list(sentinels), 0.2))
        return "; ".join(f"rank {rank} of {ranks} died with exit code {self._workers[rank][0].exitcode}" for rank in dead)

    def _first_failure(self, failures: dict[int, tuple], pipes: dict, results: dict) -> str:
        """What to say when ``failures`` are known: the one that was raised first, of those that are there by now."""
        for pipe in multiprocessing.connection.wait([p for p, rank in pipes.items() if rank not in failures and rank not in results], 0):
            with contextlib.suppress(EOFError):
                ok, payload = pipe.recv()
                if not ok:
                    failures[pipes[pipe]] = payload
        rank, (_, error, trace) = min(failures.items(), key=lambda item: item[1][0])
        others = sorted(set(failures) - {rank})
        after = f" (then rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} raised as well)" if others else ""
        return f"rank {rank} of {len(pipes)} raised {error}{after}\n{trace}"

    def close(self) -> None:
        """Ends the worker processes. The pool can be used again: it starts new ones."""
        _stop(self._workers)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _stop(workers: list[tuple]) -> None:
    """Closes the pipes, at which idle workers leave by themselves; after two seconds ends the rest, and whatever they started."""
    for _, pipe in workers:
        pipe.close()
    deadline = time.monotonic() + 2
    for process, _ in workers:
        process.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):  # nothing is left of its process group
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    workers.clear()


_shared: RankPool | None = None


def run_ranks(function: Callable, ranks: int, *args, timeout: float = 60.0) -> list:
    """:meth:`RankPool.run` on a pool shared by the whole process: ``run_ranks(f, 4, x)`` returns ``[f(x) of rank 0, ..., of rank 3]``."""
    global _shared
    if _shared is None:
        _shared = RankPool()
    return _shared.run(function, ranks, *args, timeout=timeout)


def _serve(pipe) -> None:
    os.setpgid(0, 0)  # so that the parent can end this worker together with its children
    torch.set_num_threads(1)  # p ranks share the cores
    gc.freeze()  # the imports, which collections below need not look through
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionError):  # closed, the latter with a result that nobody has read
            return
        try:
            pipe.send(_run_one(*job))
        except ConnectionError:  # closed meanwhile, because a peer failed or the parent was interrupted: nobody wants the result
            return
        # A job's models and the process groups they hold are cycles, and each of gloo's groups has threads that poll until it is freed.
        gc.collect()


def _run_one(function, args, rank, ranks, store, timeout, device) -> tuple[bool, object]:
    try:
        backend = "gloo"
        if device == "cuda":
            gpus = torch.cuda.device_count()
            torch.cuda.set_device(rank % gpus)
            backend = "gloo" if ranks > gpus else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
        )
        result = function(*args)
        buffer = io.BytesIO()
        torch.save(result, buffer)
        dist.barrier()  # nobody tears the group down while a peer still uses it
        dist.destroy_process_group()
        return True, buffer.getvalue()
    except Exception as error:  # whatever a user's function raises is the parent's to report
        # The group stays up until the parent ends this worker: without it the peers would fail too, and maybe be heard first.
        raised = time.monotonic()  # one clock for all processes of a machine
        line = "".join(traceback.format_exception_only(error)).strip()
        return False, (raised, line.partition("\n")[0], traceback.format_exc())
