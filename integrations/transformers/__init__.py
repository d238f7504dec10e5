"""transformers: ``convert`` a built Llama or Qwen 3 in place, so that its logits are those of the other frameworks at any TP size.

    model = convert(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), tree=ReductionTree(8))

The model is whole on every rank (one process, DistributedDataParallel, or FSDP2): it is TP = 1 of the comparison, the trainer whose
rollout runs at another size. Parameters, their names, ``save_pretrained`` and ``generate`` stay transformers'. A row has the same
bytes alone, in a batch, padded on either side, in a pack, and decoded with a cache as in one pass. Refused: everything else.
"""

from tpinv.integrations.transformers.convert import convert, is_converted

__all__ = ["convert", "is_converted"]
