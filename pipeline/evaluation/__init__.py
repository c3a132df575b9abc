"""Does it slide? `evaluate` gives the tables over a split, `quick` a few numbers for the training loop."""

from pipeline.evaluation import page
from pipeline.evaluation.measure import quick
from pipeline.evaluation.report import Report, Table, as_tables, markdown
from pipeline.evaluation.tables import TABLES, USUAL_TABLES, check_judge, evaluate

__all__ = ["TABLES", "USUAL_TABLES", "Report", "Table", "as_tables", "check_judge", "evaluate", "markdown", "page", "quick"]
