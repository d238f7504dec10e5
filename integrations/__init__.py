"""Frameworks that tpinv swaps into. Nothing here is imported unless asked for: ``import tpinv.integrations.megatron``."""
