"""Starts engines out of a process that has imported vLLM once: on a CPU that import is most of what an engine's start costs, and a comparison
starts a dozen.

    python -m tpinv.harness.vllm.starter        what to run comes in lines of JSON, the child's process id goes back

A child is a session of its own with its own environment and log, in which nothing of vLLM has run: plugins are loaded, and environment
variables read, by the engine. What vLLM reads while it is imported (the level of its log, whether the hub is asked) this process has as
every job has it.
"""

import ctypes
import functools
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

MODULES = (
    "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker", "vllm.model_executor.model_loader", "vllm.model_executor.models.llama", "vllm.model_executor.models.qwen3",
)  # fmt: skip
_AT_IMPORT = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore"}


class Engine:
    """A process that :class:`Starter` has started: as much of subprocess.Popen as run_job needs."""

    def __init__(self, pid: int):
        self.pid, self._ended = pid, False
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:  # it failed at once
            self._ended = True

    def poll(self) -> int | None:
        """None while it runs. How it ended nobody is told."""
        if not self._ended and select.select([self._fd], [], [], 0)[0]:
            self._ended = True
            os.close(self._fd)
        return 0 if self._ended else None

    def wait(self, timeout: float | None = None) -> None:
        """subprocess.TimeoutExpired where it runs longer."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("engine", timeout)
            time.sleep(0.02)


class Starter:
    def __init__(self):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tpinv.harness.vllm.starter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=_AT_IMPORT | os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def start(self, module: str, arguments: list[str], log: str, environment: dict[str, str]) -> Engine:
        """``module.main(*arguments)`` in a new process whose output goes to ``log``. RuntimeError where the starter itself has ended."""
        with self._lock:
            try:
                self._process.stdin.write(json.dumps([module, arguments, log, environment]) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = ""
        if not answer:
            raise RuntimeError("the process that starts engines has ended; what it printed says why (is vLLM's wheel the one for CPUs?)")
        return Engine(int(answer))


_making = threading.Lock()


def starter() -> Starter:
    """That of this process, for all its threads. It ends with it, at the end of its input."""
    with _making:
        return _starter()


@functools.cache
def _starter() -> Starter:
    return Starter()


def _serve() -> None:
    for name in MODULES:
        importlib.import_module(name)
    out = os.fdopen(os.dup(1), "w")  # the answers' own; what else is printed is not one
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are nobody's to wait for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is interrupted ends the engines, and this process's input
    for line in sys.stdin:
        module, arguments, log, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            out.close()
            _become(module, arguments, log, environment)
        print(pid, file=out, flush=True)


def _become(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """The child. Does not return."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who asked for it is gone when the starter is
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        importlib.import_module(module).main(*arguments)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # as serve_plan's own end: vLLM's processes may end badly after all is done


if __name__ == "__main__":
    _serve()
