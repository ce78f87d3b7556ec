"""Models by name: the embedded ones, synthetic checkpoints, and the families of transformers."""
