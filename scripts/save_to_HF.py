"""`PushToHubEachEpoch`, a callback for transformers' Trainer: it pushes the adapter after every epoch and at the end.

from save_to_HF import PushToHubEachEpoch
trainer.add_callback(PushToHubEachEpoch(repo_id="your-username/llama-finqa-dora"))
"""

from __future__ import annotations

from fintune.publish.push import push_callback_class

PushToHubEachEpoch = push_callback_class()
