"""A stand-in for Apex: what Megatron-Core imports of it, in torch's arithmetic. As the original, it imports without its compiled parts."""
