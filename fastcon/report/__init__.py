"""Results people look at: `probe`, `finetune` and `evaluate` JSON, RUN folders, CSV tables → tables, tally, figures, one page."""

from fastcon.report.page import write_report

__all__ = ["write_report"]
