"""Reports: one self-contained HTML page about a run, or about several side by side.

:mod:`pyro_vae.analysis.report.page` is the page; each other module fills a section of it.
"""

from pyro_vae.analysis.report.of_run import report
from pyro_vae.analysis.report.of_runs import compare_report

__all__ = ["compare_report", "report"]
