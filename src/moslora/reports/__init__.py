"""Pages of runs, comparisons and inspections."""
