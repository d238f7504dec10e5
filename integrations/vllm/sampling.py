"""What stands between logits and a token, in both of vLLM's model runners: functions of tpinv.inference in place of theirs.

    log-probabilities    the tree over the vocabulary: the trainer's bytes (raw and processed, of samples and of prompts)
    candidates           the likeliest by (larger, smaller index): torch.topk takes any of equals, by the number of rows
    greedy               the smallest index among equals
    top-k, top-p         one order of ties and of the sum of probabilities, whatever the number of requests (vLLM changes algorithms at 8)
    noise, V1 runner     a function of (seed, position); of vLLM's it has the requests' seeds, but no generator, whose state counts calls
    noise, V2 runner     vLLM's own: Philox by (seed, position) in blocks of 1024 entries, which no other request enters

A request without a seed gets one from the engine's seed and its number of arrival, as in vLLM: every rank draws the same, but another
order of arrival draws differently. These functions are attributes of vLLM's modules and classes that it offers no registry for.
"""

import torch
from torch import Tensor
from vllm.v1.sample import logits_processor, sampler
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.sample.sampler import Sampler

from tpinv import inference
from tpinv.tree import ReductionTree


class RequestKeys(LogitsProcessor):
    """Knows the seed and the position of every row of the batch: vLLM tells logits processors who comes, goes and moves.

    It is applied, to random requests, right before top-k and top-p, which is how :func:`_draw` finds the rows of this very batch.
    """

    current: "RequestKeys | None" = None
    drafted: list[int] | None = None  # of every row's request in the step that is being sampled, while vLLM speculates

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, tuple[int, list[int] | None, list[int]]] = {}
        self.engine_seed = vllm_config.model_config.seed or 0
        self.arrived = 0

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, produced in batch_update.added:
            seed = params.seed
            if seed is None:  # its own number, so that all ranks agree
                self.arrived += 1
                seed = (self.engine_seed << 32) ^ self.arrived ^ (1 << 62)
            self.rows[index] = (seed, len(prompt) if prompt is not None else 0, produced)
        for source, target, direction in batch_update.moved:
            first, second = self.rows.pop(source, None), self.rows.pop(target, None)
            if first is not None:
                self.rows[target] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = second

    def apply(self, logits: Tensor) -> Tensor:
        RequestKeys.current = self
        return logits

    def keys(self, count: int) -> tuple[list[int], list[int]]:
        """Seeds and positions of rows 0 to count - 1, whose tokens follow the drafts of their requests."""
        rows = [self.rows[index] for index in range(count)]
        drafted = RequestKeys.drafted or [0] * count
        positions = [prompt + len(produced) - 1 + drafts for (_, prompt, produced), drafts in zip(rows, drafted, strict=True)]
        return [seed for seed, _, _ in rows], positions

    def draft_keys(self, drafted: list[int]) -> tuple[list[int], list[int]]:
        """Of the rows at which drafts are checked: request by request, one for each draft."""
        rows = [(*self.rows[index], draft) for index, drafts in enumerate(drafted) for draft in range(drafts)]
        return [row[0] for row in rows], [prompt + len(produced) - 1 + draft for _, prompt, produced, draft in rows]


def install(tree: ReductionTree) -> None:
    def log_softmax(logits: Tensor) -> Tensor:
        return inference.log_softmax(logits, tree)

    def draw(self, logits: Tensor, generators: dict, k: Tensor | None, p: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """TopKTopPSampler.forward of the V1 runner. ``generators`` is emptied: on a CPU the runner would rewind them after a partial
        prefill, which torch's CPU generators cannot, and on a GPU rewind what nothing has drawn from."""
        generators.clear()
        logits = inference.keep_top(logits, k, p)
        returned = {"processed_logits": lambda: logits, "processed_logprobs": lambda: log_softmax(logits)}.get(self.logprobs_mode)
        if RequestKeys.current is None:  # a warm-up, in which no request takes part
            return inference.greedy(logits), returned and returned()
        return inference.sample(logits, *RequestKeys.current.keys(len(logits))), returned and returned()

    logits_processor.BUILTIN_LOGITS_PROCESSORS.append(RequestKeys)
    Sampler.compute_logprobs = staticmethod(log_softmax)
    Sampler.greedy_sample = staticmethod(lambda logits: inference.greedy(logits).view(-1))
    for name in ("forward_native", "forward_cuda", "forward_cpu"):
        setattr(topk_topp_sampler.TopKTopPSampler, name, draw)
    topk_topp_sampler.apply_top_k_top_p = inference.keep_top
    sampler.torch = Torch()
    _install_second_runner(tree)


class Torch:
    """torch for a module of vLLM, but for ``topk``: of equal entries, which 16-bit logits make often, the smaller indices."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def topk(x: Tensor, k: int, dim: int = -1) -> inference.sampling.TopK:
        if dim not in (-1, x.dim() - 1):
            raise ValueError(f"topk along dimension {dim} of {tuple(x.shape)} is not what vLLM was known to ask for; report its version")
        return inference.topk(x, k)


def _install_second_runner(tree: ReductionTree) -> None:
    """The V2 runner needs Triton; where that is missing it never runs."""
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        return
    from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, states
    from vllm.v1.worker.gpu.sample import sampler as second_sampler

    def compute_token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        return inference.token_log_probs(logits, token_ids, tree)

    def apply_temperature(logits: Tensor, rows: Tensor, temperature: Tensor) -> None:
        """In place. Theirs divides approximately, where the trainer rounds once."""
        logits.copy_(inference.apply_temperature(logits, temperature[rows.long()]))

    states.apply_temperature = apply_temperature
    for module in (logprob, prompt_logprob):
        if hasattr(module, "compute_token_logprobs"):
            module.compute_token_logprobs = compute_token_logprobs
    logprob.torch = Torch()
    for module in (second_sampler, states):
        module.apply_top_k_top_p = inference.keep_top
