"""Studies: a TOML file of data sets, teachers, students and evaluations → ordinary fastcon commands, run by Snakemake."""

from fastcon.study.cost import describe
from fastcon.study.engine import run
from fastcon.study.plan import Job, Study, load, shipped

__all__ = ["Job", "Study", "describe", "load", "run", "shipped"]
