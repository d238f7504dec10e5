def parallel_cross_entropy(*_):
    raise RuntimeError("TransformerEngine's cross-entropy was called")
