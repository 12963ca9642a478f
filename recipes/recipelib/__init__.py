"""What the recipes share, in rooms; from the bottom up, each imports only from those before it:

runtime, prompts, data, encoding, models, adapters, inference, evaluation, task, training,
reporting and cli.py. What a room's `__init__.py` does not name is private to it.
"""
