"""Builds TorchTitan's own RL configs without vLLM, Monarch and the others that RL needs at run time: run as a script, by test_torchtitan_rl.py.

Whatever they would import is a name that does nothing; the configs and their checks are the real ones.
"""

import importlib.machinery
import sys
import types

ABSENT = ("cloudpickle", "math_verify", "monarch", "renderers", "torchstore", "transformers", "uvloop", "vllm")


class Nothing:
    """Decorates, calls and has attributes, to no effect."""

    def __call__(self, *args, **_):
        return args[0] if args and callable(args[0]) else lambda function: function

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class Absent(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"CUSTOM": ""}) if name[0].isupper() else Nothing()  # classes are derived from
        setattr(self, name, value)
        return value


class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def refused(make) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def main() -> None:
    sys.meta_path.insert(0, Finder())
    from tpinv.integrations.torchtitan import layers, replace, rl  # isort: skip
    from torchtitan.config.override import apply_overrides
    from torchtitan.experiments.rl.examples.alphabet_sort.config_registry import rl_grpo_qwen3_0_6b_varlen_batch_invariant as stock
    from torchtitan.experiments.rl.models.attention import VLLMAttentionWrapper

    sizes = {"trainer": {"tensor_parallel_degree": 2, "enable_sequence_parallel": True}, "generator": {"tensor_parallel_degree": 4}}

    # Upstream refuses what is allowed here.
    plain = stock()
    plain.trainer.parallelism.enable_sequence_parallel = True
    assert "doesn't support SP" in refused(plain.__post_init__)
    config = rl.invariant_controller(stock(), **sizes)
    assert type(config) is rl.Controller.Config and config.trainer.debug.batch_invariant
    assert config.trainer.parallelism.enable_sequence_parallel and config.trainer.parallelism.tensor_parallel_degree == 2
    assert config.generator.parallelism.tensor_parallel_degree == 4

    # The other checks of upstream stay, and the override must be on both sides.
    config.trainer.training.mixed_precision_param = "float32"
    assert "bfloat16" in refused(config.__post_init__)
    config = rl.invariant_controller(stock(), **sizes)
    config.generator.override.imports.clear()
    assert "same arguments" in refused(config.__post_init__)
    other = stock()
    other.generator.override.imports = [(rl.OVERRIDE, {"leaves": 16})]
    assert "same arguments" in refused(lambda: rl.invariant_controller(other))
    odd = stock()
    odd.async_loop.batcher.batch.seq_len = 2047
    assert "divisible" in refused(lambda: rl.invariant_controller(odd, **sizes))

    # As both actors apply it: to the model's config alone.
    config = rl.invariant_controller(stock(), **sizes)
    model = config.model_spec.model
    model.update_from_config(config=config.trainer)
    replace.is_in_batch_invariant_mode = lambda: True  # as the trainer sets it before it builds
    inner = [layer.attention.inner_attention for layer in model.layers]
    apply_overrides(config.trainer.override, model)
    assert all(type(layer.feed_forward) is layers.FeedForward.Config for layer in model.layers)
    assert all(type(layer.attention.qk_norm) is layers.QKNorm.Config for layer in model.layers)
    assert [type(layer.attention.inner_attention) for layer in model.layers] == [type(one) for one in inner]
    assert type(model.lm_head) is layers.LMHead.Config and model.lm_head.compute_dtype == "float32"  # from RL's CastLinear

    # A generator's attention is in its place before overrides are applied, and stays.
    vllm = VLLMAttentionWrapper.Config(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
    assert replace._inner_attention(vllm, False) is vllm
    print("every check passed")


if __name__ == "__main__":
    main()
