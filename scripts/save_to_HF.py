"""`PushToHubEachEpoch`: a callback of transformers' Trainer that pushes the adapter after each epoch and at the end."""

from fintune.publish.push import push_callback_class

PushToHubEachEpoch = push_callback_class()
