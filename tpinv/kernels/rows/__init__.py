"""Kernels of rows and elements: plain sums, norms, softmax statistics, activations, embeddings, squares."""
