"""Sources: the systems that a deployment loads resources from. A short key identifies each of them.

Ids of resources are unique within one source only, so the key of a source is part of every key of the state.
"""

DEFAULT_SOURCE = "default"
"""The key of the source that the settings describe."""
