"""Measuring in processes of their own: peak memory, hard limits, the longest prompt, decoding speed."""
