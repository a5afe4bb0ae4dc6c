"""direct-rlhf: RLHF applied directly to a base language model, and the proof of what it did.

Importing this package imports no torch; each stage is imported by the verb that runs it.
"""

__version__ = "0.1.0.dev0"
