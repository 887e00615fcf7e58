"""The older commands: ``train_financial_model.py``, ``train.py`` and ``scripts/``."""
