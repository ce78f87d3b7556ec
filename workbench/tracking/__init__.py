"""Everything MLflow: the store, its runs, their traces and records, and its server."""
