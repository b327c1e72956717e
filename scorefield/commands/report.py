"""One page about a run, or about several side by side, from the files in their folders alone.

    scorefield report runs/student
    scorefield report runs/a runs/b runs/c --out comparison.html

The page holds everything it shows and asks no network. Trainings, edits, attacks and evaluations write theirs at
their end; this command makes it again, also of a run that was killed.
"""

from pathlib import Path

from scorefield.commands.options import Report, check_report
from scorefield.report.page import find_run, page
from scorefield.report.write import check_page, pages_of, save_page


def main(config: Report) -> Path:
    """Write the page and return its path."""
    check_report(config)
    for run in config.runs:
        find_run(run)  # refuses what is no run
    out = pages_of(config.runs, config.out)
    check_page(out)
    save_page(page(config.runs), out)
    print(f"report: {out}")
    return out
