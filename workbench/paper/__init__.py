"""Figures and closing tables beside the paper's, one module a notebook."""
