"""Does it slide? `evaluate` measures a model to a `Specification`; training's validation is the same pass, shorter.

    specification  what is asked for: which models, records, judge and tables
    measure        the pass over the records of a split, dealt to the processes that evaluate together
    evaluator      one model over one split
    tables, twins, distribution, probe            the numbers of each table
    report         what was measured, and what its numbers are called
    presentation   reports as tables for people
    page, pictures, plots                  a report as a page
    keeping        a report in its run's folder and in MLflow
    compare        runs side by side
"""

from pipeline.evaluation.evaluator import evaluate, quantities
from pipeline.evaluation.measure import makes_pictures
from pipeline.evaluation.presentation import Table, as_markdown, as_tables, markdown
from pipeline.evaluation.report import Report
from pipeline.evaluation.specification import TABLES, USUAL_TABLES, Specification
