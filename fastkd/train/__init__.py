"""The trainer: `fastkd train`, or `fastkd.train.engine.train(config)`. Needs `pip install "fastkd[train]"`."""
