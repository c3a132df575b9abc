"""Does it slide? `evaluate` gives the tables over a split, `quick` a few numbers for the training loop."""

from pipeline.evaluation import page
from pipeline.evaluation.evaluator import TABLES, USUAL_TABLES, evaluate
from pipeline.evaluation.judges import check_judge
from pipeline.evaluation.measure import quick
from pipeline.evaluation.report import Report, Table, as_markdown, as_tables, markdown

__all__ = [
    "TABLES",
    "USUAL_TABLES",
    "Report",
    "Table",
    "as_markdown",
    "as_tables",
    "check_judge",
    "evaluate",
    "markdown",
    "page",
    "quick",
]
