"""The computer that measures: its facts, its disk, its limits, and what else it is doing."""
