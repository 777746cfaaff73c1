"""The words the services share: messages, ids, amounts, subjects. Pure: no I/O, and nothing of ours is imported."""
