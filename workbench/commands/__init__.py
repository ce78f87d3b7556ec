"""The commands of ``emoe``, a file for each group; `workbench.cli` puts them together."""
