"""What collectives do when ranks are late, and what the others do when a rank is killed: on GPUs, or on a CPU over gloo.

    python -m tpinv.harness.faults delays --ranks 8 --calls 10000 --json delays.json
    python -m tpinv.harness.faults killed-rank --ranks 8 --timeout 20
    python -m tpinv.harness.faults killed-server --ranks 2 --checkpoint DIRECTORY

``delays``: all-reduces of many sizes in random order, every rank late by a time of its own before each; every result has the bytes of the
same sum over the process group. Ranks that share a GPU wait for one another's time slices, some milliseconds a call: ``--seconds`` ends the
calls there, on all ranks at the same one. ``killed-rank``: one rank ends itself by SIGKILL in the middle of training; every other must raise.
``killed-server``: a worker of a vLLM engine is killed while it generates; the engine must raise.

Exit status 0: as it should be; 1: it was not; 2: it could not be tried. Limits are in seconds.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import tpinv
from tpinv.collectives import process_group, resolve, symmetric, tree_all_reduce
from tpinv.harness.outputs import check_outputs
from tpinv.testing import RankError, RankPool
from tpinv.tree import ReductionTree

SIZES = (1 << 10, 12_288, 1 << 15, 1 << 17, 1 << 20, 6 << 20)  # bytes of the bf16 result
NODES = ("float32", "bfloat16")
TURN = 100  # calls between two looks at the clock
STEPS_BEFORE = 3  # that every rank finishes before one is killed
START = 300  # seconds until then


# -- late ranks -----------------------------------------------------------------------------------------------------------------------


def delay(calls: int, device: str, seconds: float = math.inf, seed: int = 0) -> dict:
    """On every rank: ``calls`` all-reduces, each after a delay of up to 2 ms on the host or, on GPUs, in the stream; fewer if ``seconds``
    have passed on rank 0. Counts results whose bytes are not those of the process group's sum."""
    ranks = resolve()
    here = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    shared, own = random.Random(seed), random.Random(1000 + seed + ranks.rank)
    messages = []
    for size in SIZES if device == "cuda" else SIZES[:3]:
        for node in NODES:
            tree = ReductionTree(ranks.size, node)
            values = torch.randn(1, size // 2, generator=torch.Generator().manual_seed(size + ranks.rank)).to(here, getattr(torch, node))
            expected = process_group.all_reduce(values, tree, ranks, torch.bfloat16)
            messages.append((values, tree, expected.view(torch.int16)))
    wrong, delayed, made, started = torch.zeros((), dtype=torch.int64, device=here), 0, 0, time.monotonic()
    for made in range(1, calls + 1):
        values, tree, expected = messages[shared.randrange(len(messages))]
        kind = own.random()
        if kind < 0.2:
            time.sleep(own.random() * 2e-3)
        elif kind < 0.4 and device == "cuda":
            torch.cuda._sleep(int(own.random() * 4e6))  # cycles: up to 2 ms
        delayed += kind < 0.4
        wrong += (tree_all_reduce(values, tree=tree, out_dtype=torch.bfloat16).view(torch.int16) != expected).any()
        if made % TURN == 0 and seconds < math.inf:
            int(wrong)  # waits until the GPU has come this far
            over = torch.tensor([time.monotonic() - started > seconds], dtype=torch.int64)
            dist.broadcast(over, 0)
            if int(over):
                break
    backend = symmetric.agreement(ranks, here)[1] if device == "cuda" else None
    path = f"{backend.backend or 'ProcessGroup'}: {backend.reason}" if backend else "ProcessGroup"
    return {"calls": made, "delayed": delayed, "wrong": int(wrong), "seconds": time.monotonic() - started, "path": path}


def run_delays(arguments) -> dict:
    with RankPool() as pool:
        found = pool.run(
            delay, arguments.ranks, arguments.calls, arguments.device, arguments.seconds, timeout=arguments.timeout, device=arguments.device
        )
    return {"ok": not any(rank["wrong"] for rank in found), "asked": arguments.calls, "ranks": found}


# -- a killed rank --------------------------------------------------------------------------------------------------------------------


def train_until_it_fails(directory: str, rank: int, size: int, device: str, timeout: float) -> None:
    """One rank of a tensor-parallel MLP in training. The last rank kills itself; the others write down what they raised, and when."""
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    own_gpu = device == "cuda" and size <= torch.cuda.device_count()
    store = dist.FileStore(os.path.join(directory, "store"), size)
    # gloo tells a dead peer at once, so that its timeout is only for ranks that start late; NCCL waits for its own.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
        store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout if own_gpu else max(timeout, START)),
    )  # fmt: skip
    tree = ReductionTree(size)
    generator = torch.Generator().manual_seed(rank)
    up = tpinv.ColumnParallelLinear(64 * size, 128 * size, bias=False, tree=tree, device=device)
    down = tpinv.RowParallelLinear(128 * size, 64 * size, bias=False, tree=tree, device=device)
    net = torch.nn.Sequential(up, down)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(32, 64 * size, generator=torch.Generator().manual_seed(1)).to(device)
    outcome = {"error": None}
    try:
        for step in range(100_000):
            if rank == size - 1 and step == STEPS_BEFORE:
                Path(directory, "killed").write_text(repr(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            net.zero_grad()
            down(tpinv.silu(up(x))).square().mean().backward()
            tpinv.clip_grad_norm_(net, 1.0)
            if device == "cuda":
                torch.cuda.synchronize()
            outcome["steps"] = step + 1
    except Exception as error:  # what it is, is what this is about
        outcome["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    outcome["raised"] = time.time()
    if device == "cuda" and outcome["error"]:  # CUDA's word for a kernel that gave up says nothing; the kernel does
        with contextlib.suppress(Exception):  # a group that never agreed on shared memory
            shared = symmetric.workspace(resolve(), torch.device("cuda", torch.cuda.current_device()))
            outcome["said"] = shared and shared.failure()
    Path(directory, f"{rank}.part").write_text(json.dumps(outcome))
    os.replace(Path(directory, f"{rank}.part"), Path(directory, f"{rank}.json"))
    os._exit(0)  # a process group with a dead member does not shut down in order


def run_killed_rank(arguments) -> dict:
    """Seconds from the kill to the error of every other rank. ok: all raised, within ``--timeout`` and 10 seconds."""
    size, limit = arguments.ranks, arguments.timeout + 10
    with tempfile.TemporaryDirectory(prefix="tpinv-") as directory:
        # No kernel is tuned, which may take a rank longer than its peers wait.
        environment = os.environ | {"TPINV_TIMEOUT": str(arguments.timeout), "TPINV_TUNE": "0"}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "tpinv.harness.faults", "rank", "--ranks", str(size), "--rank", str(rank), "--directory", directory]
                + ["--device", arguments.device, "--timeout", str(arguments.timeout)],
                env=environment,
            )
            for rank in range(size)
        ]
        try:
            if started[-1].wait(START) != -signal.SIGKILL:
                said = Path(directory, f"{size - 1}.json")
                why = json.loads(said.read_text())["error"] if said.exists() else f"status {started[-1].returncode}"
                raise RuntimeError(f"rank {size - 1} ended before it could be killed: {why}")
            killed = float(Path(directory, "killed").read_text())
            for process in started[:-1]:
                try:
                    process.wait(max(0.1, killed + limit - time.time()))
                except subprocess.TimeoutExpired:
                    continue
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{size} ranks did not get through {STEPS_BEFORE} steps in {START} s") from None
        finally:
            for process in started:
                process.kill()
                process.wait()
        found = []
        for rank in range(size - 1):
            path = Path(directory, f"{rank}.json")
            outcome = json.loads(path.read_text()) if path.exists() else {"error": None}
            seconds = round(outcome["raised"] - killed, 2) if outcome["error"] else None
            found.append(
                {"rank": rank, "error": outcome["error"], "seconds": seconds} | ({"said": said} if (said := outcome.get("said")) else {})
            )
    return {"ok": all(rank["error"] for rank in found), "limit": limit, "ranks": found}


# -- a killed worker of an engine -----------------------------------------------------------------------------------------------------


def run_killed_server(arguments) -> dict:
    """Seconds from the kill of a worker to the engine's error. ok: it raised within ``--timeout``."""
    if arguments.ranks < 2:
        raise ValueError(f"--ranks {arguments.ranks}: an engine of one rank has no worker process; give 2 or more")
    from tpinv.harness.vllm import serve_plan
    from tpinv.harness.vllm.verify import Settings, model_limits, random_model

    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        model = arguments.checkpoint or random_model(Settings(sizes=(arguments.ranks,)), os.path.join(directory, "model"))
        vocabulary, longest = model_limits(model)
        plan = serve_plan.Plan(name="killed", waves=(), budget=2048, sequences=16, prefix_cache=False, blocks=0)
        answer = min(longest - 32, 4096)
        job = {
            "layers": "tpinv", "tp": arguments.ranks, "leaves": 8, "device": arguments.device, "model": model, "dtype": "bfloat16",
            "eager": True, "block": 32, "longest": answer + 32, "requests": [], "memory": 0.3,
        }  # fmt: skip
        os.environ.update(serve_plan._environment(job) | {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(int(arguments.timeout))})
        llm = serve_plan._engine(job, plan)
        from vllm import SamplingParams

        workers = _children(os.getpid(), "VLLM::Worker")
        if len(workers) < arguments.ranks:
            raise RuntimeError(f"found {len(workers)} worker processes of an engine of {arguments.ranks} ranks")
        done: dict = {}

        def generate() -> None:
            asked = [{"prompt_token_ids": [3 + (i * 7 + j) % (vocabulary - 3) for j in range(16)]} for i in range(16)]
            try:
                while True:
                    llm.generate(asked, SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False), use_tqdm=False)
            except BaseException as error:  # also SystemExit, which vLLM raises for a dead engine
                done.update(error=f"{type(error).__name__}: {str(error)[:300]}", raised=time.time())

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        time.sleep(3)
        if done:
            raise RuntimeError(f"the engine failed before anything was killed: {done['error']}")
        killed = time.time()
        os.kill(workers[-1], signal.SIGKILL)
        thread.join(arguments.timeout + 10)
        for worker in workers[:-1]:
            try:
                os.kill(worker, signal.SIGKILL)
            except ProcessLookupError:
                continue
    seconds = round(done["raised"] - killed, 2) if done else None
    return {"ok": bool(done), "error": done.get("error"), "seconds": seconds, "limit": arguments.timeout + 10}


def _children(parent: int, name: str) -> list[int]:
    """Processes of Linux below ``parent`` whose command line begins with ``name``."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):  # it has ended meanwhile
            continue

    def below(process: int) -> bool:
        while process in parents and process != parent:
            process = parents[process]
        return process == parent

    return sorted(process for process, said in names.items() if said.startswith(name) and below(process))


# -- the command ----------------------------------------------------------------------------------------------------------------------

RUNS = {"delays": run_delays, "killed-rank": run_killed_rank, "killed-server": run_killed_server}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tpinv.harness.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=[*RUNS, "rank"], metavar="{" + ",".join(RUNS) + "}")
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="delays: make no more calls after these")
    parser.add_argument("--timeout", type=float, help="seconds that waiting ranks wait (default 20; delays: 900 for all)")
    parser.add_argument("--checkpoint", help="killed-server: a model's directory (default: a small random one)")
    parser.add_argument("--json", help="write what was found to this file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.timeout is None:
        chosen.timeout = 900.0 if chosen.what == "delays" else 20.0
    if chosen.what == "rank" and (chosen.rank is None or chosen.directory is None):
        parser.error("rank is what killed-rank starts")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, there is none here", file=sys.stderr)
        return 2
    try:
        check_outputs(chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.ranks < 2 or chosen.calls < 1 or not 0 < chosen.timeout < math.inf or not chosen.seconds > 0:
        print(
            f"--ranks {chosen.ranks} must be at least 2, --calls {chosen.calls}, --timeout {chosen.timeout} and --seconds {chosen.seconds} above 0",
            file=sys.stderr,
        )
        return 2
    if chosen.what == "rank":
        train_until_it_fails(chosen.directory, chosen.rank, chosen.ranks, chosen.device, chosen.timeout)
    try:
        found = RUNS[chosen.what](chosen)
    except (RankError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        print(f"{chosen.what}: {error}", file=sys.stderr)
        return 2
    found = {"what": chosen.what, "size": chosen.ranks, "device": chosen.device, **found}
    print(json.dumps(found), flush=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(found, indent=1))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an engine with a dead worker, or a group with a dead rank, does not end in order
