"""One registration for each function: ``register`` makes its torch operator, its gradient and its fake from one description.

    schema      "name(Tensor x, ..., int leaves, str group, ...) -> Tensor": what a graph can hold; the tree and the group by their names
    check       (*arguments): the ValueErrors that shapes, dtypes and devices decide. What one rank refuses, all refuse
    forward     (*arguments) -> results: computes and communicates, once the arguments are checked and the ranks agree on them
    fake        (*arguments) -> results of the same shapes, dtypes and strides, for compilers and meta tensors
    backward    (dy, *kept, needs, *settings) -> one gradient for each of ``gradients``, None where ``needs`` has False
    kept        names of the arguments and results that backward gets; settings are all arguments that are no tensors
    gradients   names of the arguments that get a gradient. Of the results only the first one has one
    check_values, ranks, settings    where the rule is another: errors that need the tensors' numbers; who communicates (default: the
                argument ``group``); what must be equal on all of them (default: every tensor's shape, dtype and need of a gradient, every
                other argument, and the chip: the ``everything`` of settings(everything, *arguments))
    Tensors come first in the schema. What ``check`` and settings look at is shapes, dtypes, devices, needs of gradients, and the other
    arguments, nothing else: what passed once is not asked again.

torch.ops.tpinv.<name> is opaque to torch.compile(fullgraph=True) and one entry in the save set of selective checkpointing; so is
<name>_backward. Where nobody looks (no compiler, no dispatch mode, no profiler, no functional transform, plain tensors), a call of the
``Operator`` skips the dispatcher and runs the same forward under the same autograd function: the dispatcher's way through Python costs
the host more than a small product does.

No function here has a second derivative. A backward with gradients enabled (create_graph=True) would leave a graph that ends in it,
silently: it is a RuntimeError.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.distributed.distributed_c10d import _resolve_process_group

from tpinv.collectives import Ranks, agree, chip, ranks_in, refuse
from tpinv.runtime.state import Memo

ALONE = Ranks(None, 0, 1)
_library = torch.library.Library("tpinv", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_KINDS = {
    "int": lambda value: hasattr(value, "__index__") and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "float": lambda value: hasattr(value, "__float__") and not isinstance(value, bool | Tensor),
    "str": lambda value: isinstance(value, str),
}
_KIND_NAMES = {"int": "a whole number", "bool": "True or False", "float": "a number", "str": "a name"}
_PLAIN = {Tensor, torch.nn.Parameter}
_STRIDED = torch.strided
_modes, _profiled, _transforms = (
    torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled, torch._C._functorch.peek_interpreter_stack,
)  # fmt: skip


def group_name(ranks: Ranks) -> str:
    """How an operator's arguments name a group; "" is a single rank."""
    return ranks.group.group_name if ranks.size > 1 else ""


def ranks_of(name: str) -> Ranks:
    """Inverse of :func:`group_name`. ValueError where the group is gone."""
    if not name:
        return ALONE
    try:
        return ranks_in(_resolve_process_group(name))
    except RuntimeError:
        raise ValueError(f"process group {name!r} has been destroyed; build the layers again, or pass group= of today's group") from None


def agree_backward(ranks: Ranks, name: str, needs: Sequence[bool], settings: tuple, **tensors: Tensor) -> None:
    """The agreement of a backward pass that communicates: passes can run in another order than the forward calls did."""
    if ranks.size > 1:
        shapes = tuple((field, t.shape) for field, t in tensors.items())
        key = f"{name} backward", tuple(needs), settings, shapes
        agree(ranks, key[0], lambda: (("gradients", key[1]), ("settings", settings), *shapes), key=key)


class Operator:
    """A registered function: call it with the operator's arguments."""

    def __init__(
        self, schema: str, check: Callable, forward: Callable, fake: Callable, backward: Callable | None, kept: str, gradients: str,
        fake_backward: Callable | None, check_values: Callable | None, ranks: Callable | None, settings: Callable | None,
    ):  # fmt: skip
        parsed = torch._C.parse_schema(f"tpinv::{schema}")
        names = [argument.name for argument in parsed.arguments]
        results = [result.name for result in parsed.returns]
        self.name, self.check, self.forward, self.fake, self.backward = parsed.name.split("::")[1], check, forward, fake, backward
        self._tensors = sum("Tensor" in str(argument.type) for argument in parsed.arguments)  # they come first
        self._setting_types = [(argument.name, str(argument.type)) for argument in parsed.arguments[self._tensors :]]
        self._seen_types: set[tuple] = set()  # of settings that are of their kinds; True == 1 has the key of 1
        self._optional = {argument.name for argument in parsed.arguments if "Optional" in str(argument.type)}
        held = names[: self._tensors] + results
        self._kept, self._several = [held.index(name) for name in kept.split()], len(results) > 1
        self._first = self._kept == list(range(len(self._kept))) and len(self._kept) <= self._tensors  # the first tensors are kept
        self._gradients = [names.index(name) for name in gradients.split()]
        self._names, group = names, names.index("group") if "group" in names else None
        self._check_values = check_values
        self._ranks = ranks or (group and (lambda *arguments: ranks_of(arguments[group])))
        self._settings = settings
        self._checked: Memo = Memo(1 << 12)  # facts of calls that one rank makes alone and that ``check`` has let pass
        self._define(schema, self._compute, self._fake)
        self.overload = getattr(torch.ops.tpinv, self.name).default
        self._differentiable = self._autograd_function()
        # What Function.apply does before this is for functional transforms, and those are shown the operator.
        self._apply = super(torch.autograd.Function, self._differentiable).apply
        _library.impl(f"tpinv::{self.name}", self._dispatched, "Autograd", with_keyset=True)
        if backward is not None:
            of = {argument.name: argument for argument in (*parsed.arguments, *parsed.returns)}
            kept_schema = [f"{of[name].type} {name}".replace("Optional[Tensor]", "Tensor?") for name in kept.split()]
            settings = schema[schema.index("(") + 1 : schema.rindex("->")].strip().removesuffix(")").split(", ")[self._tensors :]
            kept_and_needs = ["Tensor dy", *kept_schema, "bool[] needs", *settings]
            self._fake_backward = fake_backward or self._like_kept(gradients.split(), kept.split())
            self._define(f"{self.name}_backward({', '.join(kept_and_needs)}) -> Tensor[]", self._compute_backward, self._fake_needed)
            self._backward_overload = getattr(torch.ops.tpinv, f"{self.name}_backward").default
            _library.impl(f"tpinv::{self.name}_backward", self._dispatched_backward, "Autograd", with_keyset=True)

    def __call__(self, *arguments, fused=None, ranks: Ranks | None = None):
        """``fused``: where gradients go instead of to autograd; an object whose ``add_to(ctx)`` becomes an argument of backward. ``ranks``:
        the group of that name, where the caller holds it: to look it up costs as much as to agree on a known call."""
        if is_compiling():
            return self.overload(*arguments) if fused is None else self._outside_graphs(*arguments, fused=fused)
        count = self._tensors
        tensors, settings = (arguments[:count], arguments[count:]) if len(arguments) > count else (arguments, ())
        if settings and (types := tuple(map(type, settings))) not in self._seen_types:
            self._check_settings(arguments, types)
        try:
            facts, plain, wants = _facts(tensors)
        except (AttributeError, RuntimeError):  # no tensor; a nested one
            self._refuse_tensors(*arguments)
            raise
        if not plain:
            self._refuse_tensors(*arguments)
        if fused is None and (not plain or _modes() or _profiled() or _transforms()):
            return self.overload(*arguments)
        key = self.name, facts, settings
        if (wants and is_grad_enabled()) or forward_ad._current_level >= 0:  # which says of dual numbers that it has none
            return self._apply((key, None, fused, ranks), *tensors)
        return self._compute_known(key, arguments, ranks)

    def of_one(self, x):
        """The call of a function of one tensor and nothing else, straight away: where there is anything to look at, ``__call__`` does."""
        plain = not is_compiling() and type(x) in _PLAIN and x.layout is _STRIDED and not x.is_meta and not x.is_neg()
        if not plain or _modes() or _profiled() or _transforms() or forward_ad._current_level >= 0:
            return self(x)
        requires_grad = x.requires_grad
        key = self.name, (x.shape, x.dtype, x.device, requires_grad), ()
        if requires_grad and is_grad_enabled():
            return self._apply((key, None, None, None), x)
        return self._compute_alone(key, (x,))

    @torch.compiler.disable
    def _outside_graphs(self, *arguments, fused):
        return self(*arguments, fused=fused)

    # -- the operator ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _define(schema: str, compute: Callable, fake: Callable) -> None:
        name = "tpinv::" + schema.split("(")[0]
        _library.define(schema, tags=_TAGS)
        _library.impl(name, torch.no_grad()(compute), "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=_library)

    def _compute(self, *arguments):
        facts, _, _ = _facts(arguments[: self._tensors])
        return self._compute_known((self.name, facts, arguments[self._tensors :]), arguments)

    def _compute_known(self, key: tuple, arguments: tuple, ranks: Ranks | None = None):
        """``key``: all that ``check`` and the ranks' agreement look at. What has passed once passes again."""
        if self._ranks is not None:
            ranks = ranks or self._ranks(*arguments)
            if ranks.size > 1:
                check = self._check_values and (lambda: self._check_values(*arguments))
                agree(ranks, self.name, lambda: self._checked_signature(*arguments), check, key)
                return self.forward(*arguments)
        return self._compute_alone(key, arguments)

    def _compute_alone(self, key: tuple, arguments: tuple, _: Ranks | None = None):
        """The same for one rank."""
        if key not in self._checked:
            self._check_tensors(*arguments)
            self.check(*arguments)
            self._checked[key] = True
        if self._check_values is not None:
            self._check_values(*arguments)
        return self.forward(*arguments)

    def _checked_signature(self, *arguments) -> Iterable[tuple]:
        self._check_tensors(*arguments)
        self.check(*arguments)
        everything = self._everything(*arguments)
        return everything if self._settings is None else self._settings(everything, *arguments)

    def _check_tensors(self, *arguments) -> None:
        """Dense tensors of one device, none left out: what no function here looks at again."""
        given = dict(zip(self._names, arguments[: self._tensors], strict=False))
        for name, t in given.items():
            if t is None and name in self._optional:
                continue
            if not isinstance(t, Tensor) or t.is_nested or t.layout is not torch.strided:
                kind = type(t).__name__ if not isinstance(t, Tensor) else "nested" if t.is_nested else t.layout
                raise ValueError(f"{name} of {self.name} is {kind}; pass a dense torch.Tensor")
        devices = {name: str(t.device) for name, t in given.items() if t is not None}
        if len(set(devices.values())) > 1:
            raise ValueError(f"the tensors of {self.name} are on several devices, {devices}; move them to one (from meta: to_empty)")

    def _refuse_tensors(self, *arguments) -> None:
        try:
            self._check_tensors(*arguments)
        except ValueError as error:
            refuse(self._ranks(*arguments) if self._ranks else ALONE, self.name, error)
            raise error from None

    def _check_settings(self, arguments: tuple, types: tuple) -> None:
        """ValueError on every rank unless settings are what the schema says: True is no number here, 1.0 no whole one, [] nothing."""
        for (name, kind), value, of in zip(self._setting_types, arguments[self._tensors :], types, strict=True):
            if (kind in _KINDS and not _KINDS[kind](value)) or of.__hash__ is None:
                error = ValueError(f"{name}={value!r} of {self.name} is a {of.__name__}; pass {_KIND_NAMES.get(kind, kind)}")
                refuse(self._ranks(*arguments) if self._ranks else ALONE, self.name, error)
                raise error
        self._seen_types.add(types)

    def _everything(self, *arguments) -> list[tuple]:
        settings = [(name, value) for name, value in zip(self._names, arguments, strict=True) if name != "group"][self._tensors :]
        for name, t in zip(self._names, arguments[: self._tensors], strict=False):
            if t is None:
                settings.append((name, None))
            else:
                settings += (name, t.shape), (f"dtype of {name}", t.dtype), (f"gradient of {name}", t.requires_grad)
        return [*settings, ("chip", chip(arguments[0].device))]

    def _fake(self, *arguments):
        if not any(isinstance(size, torch.SymInt) for t in arguments[: self._tensors] if t is not None for size in t.shape):
            self._check_tensors(*arguments)
            self.check(*arguments)  # symbols are checked when the compiled code runs: no guard for the sake of a message
        return self.fake(*arguments)

    def _dispatched(self, keyset, *arguments):
        tensors = arguments[: self._tensors]
        if _wants_gradient(tensors):
            return self._differentiable.apply(((self.name, None, arguments[self._tensors :]), keyset, None, None), *tensors)
        return _below_autograd(self.overload, keyset, *arguments)

    def _compute_backward(self, dy, *arguments) -> list[Tensor]:
        gradients = self.backward(dy, *arguments)
        needs = arguments[len(self._kept)]
        return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]

    def _fake_needed(self, dy, *arguments) -> list[Tensor]:
        needs = arguments[len(self._kept)]
        return [gradient for gradient, need in zip(self._fake_backward(dy, *arguments), needs, strict=True) if need]

    def _like_kept(self, gradients: list[str], kept: list[str]) -> Callable:
        places = [kept.index(name) for name in gradients]
        return lambda dy, *arguments: [torch.empty_like(arguments[i], memory_format=torch.contiguous_format) for i in places]

    def _dispatched_backward(self, keyset, *arguments):
        if _wants_gradient([t for t in arguments if isinstance(t, Tensor)]):
            raise RuntimeError(self._no_second_derivative())
        return _below_autograd(self._backward_overload, keyset, *arguments)

    # -- its gradient ------------------------------------------------------------------------------------------------------------

    def _autograd_function(self) -> type:
        operator, kept, several, first = self, self._kept, self._several, self._first
        compute = self._compute_known if self._ranks else self._compute_alone
        everything, no_gradient, has_settings = first and len(kept) == self._tensors, self.backward is None, bool(self._setting_types)

        class Differentiable(torch.autograd.Function):
            """``call``: the key, which ends in the settings; the keyset of a call through the dispatcher, else None; ``fused``; ``ranks``."""

            @staticmethod
            def forward(ctx, call, *tensors):
                key, keyset, _, ranks = call
                arguments = tensors
                if has_settings:
                    ctx.call = call
                    arguments += key[2]
                if no_gradient:
                    operator._refuse_gradient(*arguments)
                if keyset is None:
                    results = compute(key, arguments, ranks)
                else:
                    results = _below_autograd(operator.overload, keyset, *arguments)
                if everything:
                    ctx.save_for_backward(*tensors)
                elif first:
                    ctx.save_for_backward(*tensors[: len(kept)])
                else:
                    held = tensors + results if several else (*tensors, results)
                    ctx.save_for_backward(*[held[i] for i in kept])
                if several:
                    ctx.mark_non_differentiable(*results[1:])
                    ctx.set_materialize_grads(False)
                return results

            @staticmethod
            def backward(ctx, dy, *_):
                if torch.is_grad_enabled():
                    raise RuntimeError(operator._no_second_derivative())
                spread = [None] * (1 + operator._tensors)
                needs = [ctx.needs_input_grad[1 + i] for i in operator._gradients]
                if dy is None or not any(needs):
                    return tuple(spread)
                kept = ctx.saved_tensors
                (_, _, settings), _, fused, _ = ctx.call if has_settings else (((), (), ()), None, None, None)
                if fused is None and (_watched() or not _facts((dy, *kept))[1]):
                    gradients = iter(operator._backward_overload(dy, *kept, needs, *settings))
                    gradients = [next(gradients) if need else None for need in needs]
                elif fused is None:
                    gradients = operator.backward(dy, *kept, needs, *settings)
                else:
                    gradients = operator.backward(dy, *kept, needs, *settings, add_to=fused.add_to(ctx))
                for i, gradient, need in zip(operator._gradients, gradients, needs, strict=True):
                    spread[1 + i] = gradient if need else None
                return tuple(spread)

        Differentiable.__name__ = Differentiable.__qualname__ = f"tpinv_{self.name}"
        return Differentiable

    def _refuse_gradient(self, *arguments) -> None:
        error = ValueError(f"{self.name} has no gradient; use the separate operations, or call it under torch.no_grad()")
        refuse(self._ranks(*arguments) if self._ranks else ALONE, self.name, error)
        raise error

    def _no_second_derivative(self) -> str:
        return (
            f"the backward of tpinv's {self.name} ran with gradients enabled (create_graph=True), and it has no gradient of its own: what is "
            "computed from these gradients could not be trained. Take the gradient without create_graph, or use stock layers for this term"
        )


def register(
    schema: str, *, check: Callable, forward: Callable, fake: Callable, backward: Callable | None = None, kept: str = "",
    gradients: str = "", fake_backward: Callable | None = None, check_values: Callable | None = None, ranks: Callable | None = None,
    settings: Callable | None = None,
) -> Operator:  # fmt: skip
    """Defines torch.ops.tpinv.<name> and, with ``backward``, <name>_backward; the module's docstring says what each argument is.
    ``fake_backward``: gradients' fakes where they are not those of kept tensors of the same names."""
    return Operator(schema, check, forward, fake, backward, kept, gradients, fake_backward, check_values, ranks, settings)


def _facts(tensors: Sequence[Tensor | None]) -> tuple[tuple, bool, bool]:
    """What checks and agreement look at; are all of them plain tensors, whose numbers lie where they say; does one require a gradient?"""
    facts, plain, wants = (), True, False
    for t in tensors:
        if t is None:
            facts += (None,)
            continue
        if requires_grad := t.requires_grad:
            wants = True
        facts += t.shape, t.dtype, t.device, requires_grad
        if type(t) not in _PLAIN or t.layout is not _STRIDED or t.is_meta or t.is_neg():
            plain = False
            facts += (t.layout,)
    return facts, plain, wants


def _watched() -> bool:
    """Whether somebody must see an operator: a dispatch mode, a profiler, a functional transform."""
    return bool(_modes() or _profiled() or _transforms())


def _wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    if forward_ad._current_level >= 0:  # autograd.Function says of dual numbers that it has none
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _below_autograd(overload, keyset, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
