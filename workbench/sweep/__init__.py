"""Sweeps: the file, its points, its plan, where its runs execute, and how it resumes."""
