"""The runs of the store as a static site: one folder that opens from a disk, without a server and without scripts.

``index.html`` leads to a page a sweep, a page a run and the paper's figures beside ours; what the pages show lies
beside them as files (CSV, JSON, Parquet, the executed notebooks). Every memory figure of a run stands beside what it
cost in quality, or beside the statement that quality was not measured. Nothing here measures.
"""

from workbench.report.site import DEFAULT_FOLDER, write_report

__all__ = ["DEFAULT_FOLDER", "write_report"]
