"""`PushToHubEachEpoch`, a callback for transformers' Trainer: pushes the adapter behind each epoch and at the end.

from save_to_HF import PushToHubEachEpoch
trainer.add_callback(PushToHubEachEpoch(repo_id="your-username/llama-finqa-dora"))
"""

from __future__ import annotations

from fintune.training.hub_callback import callback_class

PushToHubEachEpoch = callback_class()
