"""What a self-draft needs outside the workers: slots ahead of the last token, and a prefix cache that keeps apart what is not verified.

    scheduler   reserves num_speculative_tokens slots more for a drafter that says ``writes_ahead``, as it does for a draft model
    requests    that waive the guarantee get a cache salt of their own: the blocks they fill hold keys and values of drafts, and only requests
                that waive it too may find them

Both are attributes of vLLM's classes, which have no registry for them.
"""

import functools
import importlib

from vllm.sampling_params import SamplingParams

SALT = "tpinv: not deterministic"
# What a draft takes into account, or what is looked at after it: all else must stand at vLLM's default for a draft to be committed.
_TAKEN = {
    "n", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "output_text_buffer_length", "stream_interval", "skip_clone",
    "_eos_token_id", "_all_stop_token_ids", "extra_args",
}  # fmt: skip
_RESOLVED = {"watermarking": False}  # what vLLM's front end makes of a default


def is_waived(params: SamplingParams | None) -> bool:
    """Whether a request takes drafts as they are: ``extra_args={"deterministic": False}``, and nothing asked for that drafts have not. Over
    HTTP, where vLLM's ``vllm_xargs`` knows no booleans, False arrives as 0."""
    extra = params.extra_args if params is not None else None
    if not isinstance(extra, dict) or extra.keys() != {"deterministic"}:
        return False
    if type(extra["deterministic"]) not in (bool, int) or extra["deterministic"]:
        return False
    usual = SamplingParams()
    given = {name: getattr(params, name) for name in params.__struct_fields__ if name not in _TAKEN}
    return all(value == getattr(usual, name) or value is _RESOLVED.get(name, usual) for name, value in given.items())


def writes_ahead(config) -> bool:
    """Whether the drafter of a VllmConfig writes to the requests' own slots."""
    speculative = config.speculative_config
    if speculative is None or speculative.method != "custom_class":
        return False
    module, _, name = str(speculative.model).rpartition(".")
    return bool(getattr(getattr(importlib.import_module(module), name, None), "writes_ahead", False))


def install() -> None:
    """Once a process."""
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    make = Request.from_engine_core_request.__func__

    @functools.wraps(make)
    def from_engine_core_request(cls, request, block_hasher):
        if is_waived(request.sampling_params):
            request.cache_salt = f"{request.cache_salt or ''}\n{SALT}"
        return make(cls, request, block_hasher)

    Request.from_engine_core_request = classmethod(from_engine_core_request)

    ahead = getattr(VllmConfig, "num_lookahead_tokens", None)
    if ahead is not None:  # vLLM 0.32: what all its components ask
        VllmConfig.num_lookahead_tokens = property(
            lambda config: config.num_speculative_tokens if writes_ahead(config) else ahead.fget(config)
        )
        return
    build = Scheduler.__init__

    @functools.wraps(build)
    def __init__(self, vllm_config, *arguments, **keywords):
        build(self, vllm_config, *arguments, **keywords)
        if writes_ahead(vllm_config):
            self.num_lookahead_tokens = self.num_spec_tokens

    Scheduler.__init__ = __init__
