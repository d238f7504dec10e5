"""What ``tpinv verify`` and ``tpinv bench step`` run on every rank: models, data, training loops. Nobody who only trains imports this."""
