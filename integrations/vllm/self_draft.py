"""Self-draft: an engine whose own weights draft on fast kernels, into the requests' own slots, and whose invariant step decides.

    --worker-cls tpinv.integrations.vllm.self_draft.Worker --no-async-scheduling
    --speculative-config '{"method": "custom_class", "model": "tpinv.integrations.vllm.self_draft.SelfDraft", "num_speculative_tokens": 8}'

A step of this engine: vLLM's ordinary speculative step over the last token and k drafts, by the invariant layers, which writes the keys and
values of all its rows over what the draft left there; speculation.py's acceptance; then, in :class:`SelfDraft`, k decode steps of the very
same modules inside fast.fast(), whose keys and values go to the slots behind the last token. Nothing of them is read by an invariant row:
the next step begins at that last token and writes before it reads. Prefix caching sees only what the scheduler has verified. So there is
one copy of the weights and one cache, where a draft model has two. ``SelfDraftFp8`` drafts with fp8 copies of the weights, half as many bytes.

Requests may waive the guarantee: ``SamplingParams(extra_args={"deterministic": False})``, in HTTP ``"vllm_xargs": {"deterministic": false}``.
Their drafts are committed as they stand, with the draft's keys and values, and only the last is a row of the invariant step, which so takes
one row of such a request where it takes k + 1 of another (:class:`Drafting`). What they leave in the prefix cache is found by their like
alone. It is a permission: a request that asks for log-probabilities, penalties or anything else that a draft has not is decided like all
others, and any value but False (0, as HTTP has it) is none. Steps in which every request is deterministic are not drafted in bfloat16,
which would cost what it saves; with fp8 they are.

Drafts are drawn with the request's own noise of (seed, position), temperature, top-k and top-p, so that sampled requests accept as greedy
ones do. On a GPU a draft step is one CUDA graph for each batch size that vLLM captures (none with enforce_eager), sampling behind it.
B requests that are drafted for, k drafts.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform

from tpinv import inference
from tpinv.integrations.vllm import attention, fast, speculation
from tpinv.integrations.vllm.waived import is_waived


class SelfDraft:
    """What vLLM asks for drafts (``method="custom_class"``). Its runner is :class:`Drafting`, which binds it."""

    fp8 = False
    writes_ahead = True  # see waived.py

    def __init__(self, vllm_config):
        self.config, self.count = vllm_config, vllm_config.speculative_config.num_speculative_tokens
        self.runner = self.model = self.buffers = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of rows
        self.stale = False

    def bind(self, runner) -> None:
        self.runner = runner

    def load_model(self, target: torch.nn.Module) -> None:
        """``target``: the runner's. RuntimeError without the runner that this drafter needs."""
        if self.runner is None:
            raise RuntimeError(f"{type(self).__name__} needs its own worker; set worker_cls={Worker.__module__}.Worker")
        self.model = target.unwrap() if hasattr(target, "unwrap") else target
        if not self.fp8:
            return
        fast.round_weights(self.model)
        load = self.model.load_weights

        @functools.wraps(load)
        def load_weights(*arguments, **keywords):
            self.stale = True
            return load(*arguments, **keywords)

        self.model.load_weights = load_weights

    def refresh(self) -> None:
        """After weights were changed by other means than vLLM's load_weights and reload_weights: the fp8 copies follow."""
        if self.fp8:
            fast.round_weights(self.model)
        self.stale = False

    def propose(self, sampled_token_ids: list[list[int]], num_tokens_no_spec, token_ids_cpu, **others) -> list[list[int]]:
        """Of every row of the batch its drafts: none where nothing was sampled (a prompt's chunk) or nothing more is wanted."""
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows, counts = [], []
        for row, sampled in enumerate(sampled_token_ids):
            count = self._room(row, int(num_tokens_no_spec[row])) if sampled else 0
            if count > 0:
                rows.append(row)
                counts.append(count)
        if not rows or not self._worthwhile(rows):
            return drafts
        if self.stale:
            self.refresh()
        last = [int(num_tokens_no_spec[row]) - 1 for row in rows]
        ids = [int(token_ids_cpu[row, position]) for row, position in zip(rows, last, strict=True)]
        proposed = self._draft(rows, ids, last, counts)
        for row, count, tokens in zip(rows, counts, proposed, strict=True):
            drafts[row] = tokens[:count]
        return drafts

    def _room(self, row: int, tokens: int) -> int:
        """Drafts that can be committed with one more token behind them, in the model's length, the request's and the slots that it holds."""
        request = self.runner.requests[self.runner.input_batch.req_ids[row]]
        table = self.runner.input_batch.block_table[0]
        slots = int(table.num_blocks_per_row[row]) * table.block_size - (tokens - 1)
        room = min(self.count, self.runner.max_model_len - 1 - tokens, slots)
        most = request.sampling_params.max_tokens
        return room if most is None else min(room, most - len(request.output_token_ids) - 1)

    def _worthwhile(self, rows: list[int]) -> bool:
        return self.fp8 or any(self.runner.input_batch.req_ids[row] in self.runner.waived for row in rows)

    @torch.inference_mode()
    def _draft(self, rows: list[int], ids: list[int], last: list[int], counts: list[int]) -> list[list[int]]:
        """Decode steps from the tokens ``ids`` at the positions ``last``, in the slots of these rows of the batch: [B][max(counts)]."""
        batch = len(rows)
        held = self._held()
        size = min((size for size in self.graphs if size >= batch), default=batch)
        held.fill(size, self.runner.input_batch.block_table[0], rows, ids, last, counts)
        sampling = _Sampling(self.runner.input_batch.sampling_metadata, rows, last)
        steps = max(counts)
        found = torch.empty(steps, batch, dtype=torch.int32, device=held.ids.device)
        for step in range(steps):
            if size in self.graphs:
                self.graphs[size].replay()
                logits = held.logits
            else:
                logits = self._step(size, min(max(last) + steps + 1, self.runner.max_model_len))
            held.ids[:batch] = sampling.draw(logits[:batch], step)
            found[step] = held.ids[:batch]
        return found.t().tolist()

    def _step(self, size: int, longest: int) -> Tensor:
        """One decode step of ``size`` rows from the buffers -> logits [size, V]; their positions advance."""
        held = self.buffers
        positions = held.positions[:size]
        valid = positions <= held.final[:size]
        place = torch.where(valid, positions, 0)
        page = held.table[:size].gather(1, (place // held.block).unsqueeze(1)).squeeze(1).long()
        slots = torch.where(valid, page * held.block + place % held.block, -1)
        lengths = (place + 1).to(torch.int32)
        metadata = attention.TreeMetadata(size, held.starts[: size + 1], lengths, held.table[:size], slots, 1, longest)
        names = [module.layer_name for module in self.model.modules() if attention.is_layer(module)]
        with fast.fast(), set_forward_context(
            dict.fromkeys(names, metadata), self.config, num_tokens=size, slot_mapping=dict.fromkeys(names, slots)
        ):  # fmt: skip
            logits = self.model.compute_logits(self.model(held.ids[:size], place))
        positions += 1
        return logits

    def _held(self) -> "_Buffers":
        if self.buffers is None:
            runner = self.runner
            if len(runner.kv_cache_config.kv_cache_groups) != 1:
                raise RuntimeError("the layers' caches are of several kinds, which a self-draft does not cover; use a draft model")
            self.buffers = _Buffers(runner.input_batch.block_table[0], runner.scheduler_config.max_num_seqs, runner.device)
        return self.buffers

    @torch.inference_mode()
    def capture(self) -> None:
        """Records a step for every batch size that vLLM records. Within vLLM's graph_capture."""
        held, most = self._held(), self.runner.scheduler_config.max_num_seqs
        sizes = {min(size, most) for size in self.config.compilation_config.cudagraph_capture_sizes or ()} | {1}
        pool = current_platform.get_global_graph_pool()
        for size in sorted(sizes, reverse=True):
            held.fill(size, self.runner.input_batch.block_table[0], [], [], [], [])
            logits = self._step(size, self.runner.max_model_len)  # chooses tiles and workspaces
            if held.logits is None:  # the largest comes first
                held.logits = torch.empty_like(logits)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                held.logits[:size].copy_(self._step(size, self.runner.max_model_len))
            self.graphs[size] = graph


class SelfDraftFp8(SelfDraft):
    """Drafts with fp8 weights, copies beside the target's: half their bytes more memory, half the bytes to read at a draft step."""

    fp8 = True


class _Buffers:
    """What a step reads, at addresses that stay: token, position and last position of each row, its pages. And the logits it gives."""

    def __init__(self, table, most: int, device: torch.device):
        whole = table.get_device_tensor(1)
        self.block = table.block_size
        self.ids = torch.zeros(most, dtype=torch.int32, device=device)
        self.positions = torch.zeros(most, dtype=torch.int64, device=device)
        self.final = torch.full((most,), -1, dtype=torch.int64, device=device)
        self.table = torch.zeros(most, whole.shape[1], dtype=whole.dtype, device=device)
        self.starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.logits: Tensor | None = None  # of graphs of all sizes

    def fill(self, size: int, table, rows: list[int], ids: list[int], last: list[int], counts: list[int]) -> None:
        """Rows past the requests' write nothing and read one key of the first page."""
        batch, device = len(rows), self.ids.device
        self.final[batch:size].fill_(-1)
        self.positions[batch:size].zero_()
        if not batch:
            return
        final = [position + count - 1 for position, count in zip(last, counts, strict=True)]
        given = torch.tensor([ids, last, final, rows], dtype=torch.int64).to(device, non_blocking=True)
        self.ids[:batch] = given[0]
        self.positions[:batch] = given[1]
        self.final[:batch] = given[2]
        self.table[:batch] = table.get_device_tensor(max(rows) + 1)[given[3]]


class _Sampling:
    """What plain decoding does with a row's logits, as far as a draft does it: temperature, top-k, top-p, noise of (seed, position)."""

    def __init__(self, metadata, rows: list[int], last: list[int]):
        self.last, self.seeds = last, None
        keys = None if metadata.all_greedy else speculation._keys(metadata.logitsprocs)
        if keys is None:
            return
        index = torch.tensor(rows, device=metadata.temperature.device)
        self.seeds = [keys.rows[row][0] for row in rows]
        self.temperature = metadata.temperature[index]
        self.k, self.p = (given if given is None else given[index] for given in (metadata.top_k, metadata.top_p))

    def draw(self, logits: Tensor, step: int) -> Tensor:
        own = inference.greedy(logits)
        if self.seeds is None:
            return own
        random = self.temperature >= 1e-5
        chosen = inference.keep_top(inference.apply_temperature(logits, self.temperature.masked_fill(~random, 1.0)), self.k, self.p)
        drawn = inference.sample(chosen, self.seeds, [position + step for position in self.last])
        return torch.where(random, drawn, own)


# -- the runner and the worker ------------------------------------------------------------------------------------------------------


class Drafting:
    """Before vLLM's V1 model runner: binds the drafter, and commits the drafts of requests that waived the guarantee.

    Of such a request the scheduler has scheduled the last token and its drafts. The runner takes the drafts for tokens that were sampled and
    computed before, which they were, but by fast kernels, and computes the last of them alone; the scheduler is told of drafts and token, as
    of a step in which all drafts were right.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        if not isinstance(getattr(self, "drafter", None), SelfDraft):
            raise ValueError(
                f"worker_cls={Worker.__module__}.Worker is for self-drafts; set speculative_config to method custom_class and model "
                f"{SelfDraft.__module__}.SelfDraft, or leave worker_cls out"
            )
        self.waived: set[str] = set()
        self.committed: dict[str, list[int]] = {}
        self.drafter.bind(self)

    def _input_fits_in_drafter(self, common_attn_metadata) -> bool:
        """The drafter knows each request's room; vLLM's rule would give all requests drafts of zeros where one has none."""
        if common_attn_metadata is None:
            raise RuntimeError("vLLM built no metadata for a speculative step, which this version was not known to do; report it")
        return True

    def execute_model(self, scheduler_output, *arguments, **keywords):
        self.waived -= scheduler_output.finished_req_ids
        for request in scheduler_output.scheduled_new_reqs:
            (self.waived.add if is_waived(request.sampling_params) else self.waived.discard)(request.req_id)
        self.committed = {
            name: list(drafts) for name, drafts in scheduler_output.scheduled_spec_decode_tokens.items()
            if name in self.waived and drafts and scheduler_output.num_scheduled_tokens[name] == len(drafts) + 1
        }  # fmt: skip
        if self.committed:
            scheduler_output = self._shorten(scheduler_output)
        return super().execute_model(scheduler_output, *arguments, **keywords)

    def _shorten(self, scheduler_output):
        """The scheduler's own object stays as it is: with one rank it is this very one that it reads the answer by."""
        cached = scheduler_output.scheduled_cached_reqs
        more = [len(self.committed.get(name, ())) for name in cached.req_ids]
        for name, drafts in self.committed.items():
            self.requests[name].output_token_ids.extend(drafts)
            row = self.input_batch.req_id_to_index.get(name)
            if row is not None:  # else it comes back to the batch with all its tokens
                first = self.input_batch.num_tokens_no_spec[row]
                place = slice(first, first + len(drafts))
                self.input_batch.token_ids_cpu[row, place] = drafts
                self.input_batch.is_token_ids[row, place] = True
                self.input_batch.num_tokens_no_spec[row] = first + len(drafts)
        advanced = {
            name: [value + count for value, count in zip(getattr(cached, name), more, strict=True)]
            for name in ("num_computed_tokens", "num_output_tokens")
        }
        return dataclasses.replace(
            scheduler_output,
            scheduled_cached_reqs=dataclasses.replace(cached, **advanced),
            num_scheduled_tokens={n: c - len(self.committed.get(n, ())) for n, c in scheduler_output.num_scheduled_tokens.items()},
            total_num_scheduled_tokens=scheduler_output.total_num_scheduled_tokens - sum(more),
            scheduled_spec_decode_tokens={
                name: drafts for name, drafts in scheduler_output.scheduled_spec_decode_tokens.items() if name not in self.committed
            },
        )

    def sample_tokens(self, *arguments, **keywords):
        output, committed = super().sample_tokens(*arguments, **keywords), self.committed
        if committed:
            output.sampled_token_ids = [
                [*committed.get(name, ()), *tokens] for name, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True)
            ]
            self.committed = {}
        return output

    def capture_model(self, *arguments, **keywords):
        from vllm.config import CUDAGraphMode
        from vllm.distributed.parallel_state import graph_capture

        size = super().capture_model(*arguments, **keywords)
        if self.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            with self._freeze_gc(), graph_capture(device=self.device):
                self.drafter.capture()
            torch.cuda.synchronize()
        return size

    def reload_weights(self, *arguments, **keywords):
        try:
            return super().reload_weights(*arguments, **keywords)
        finally:
            self.drafter.stale = True


@contextlib.contextmanager
def _runner_of(module, name: str, mixin: type) -> Iterator[None]:
    """Whoever makes a runner of ``module`` gets one that drafts."""
    stock = getattr(module, name)
    setattr(module, name, type(name, (mixin, stock), {"__module__": __name__}))
    try:
        yield
    finally:
        setattr(module, name, stock)


if current_platform.is_cpu():
    from vllm.v1.worker import cpu_worker as _holder
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker

    _RUNNER = "CPUModelRunner"
else:
    from vllm.v1.worker import gpu_model_runner as _holder
    from vllm.v1.worker.gpu_worker import Worker as _Worker

    _RUNNER = "GPUModelRunner"


class Worker(_Worker):
    """``worker_cls``: vLLM's worker with the runner above."""

    runner = Drafting

    def init_device(self):
        with _runner_of(_holder, _RUNNER, self.runner):
            return super().init_device()

    def refresh_draft(self) -> None:
        """By ``collective_rpc``, see :meth:`SelfDraft.refresh`."""
        self.model_runner.drafter.refresh()
