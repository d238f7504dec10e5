"""``tpinv verify --framework vllm`` and ``tpinv bench serve``: engines in processes of their own, and what they answer."""

KINDS = "stock", "batch-invariant", "tpinv"  # of layers that an engine can have
