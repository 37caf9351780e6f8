"""The report of an output: a static folder that a browser opens from disk or from an object store."""

from tasks.report.build import Report as Report, write_report as write_report
