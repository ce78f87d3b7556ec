"""A recorded run made again from its own artifacts, and held against what it recorded."""
