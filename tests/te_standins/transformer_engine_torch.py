"""The compiled part of TransformerEngine: nothing that Megatron-Core's dense layers call by this name."""
