"""Many runs of one recipe with some of its fields varied, on this machine or in SLURM.

axes.py       what is varied, and the points of a grid or of one axis at a time
search.py     points that optuna chooses
study.py      the folder on disk: the design, and a record of each run
plan.py       which points there are, each checked before anything starts
launch.py     one run's command line
runner.py     runs in parallel, resumable
progress.py   the progress bar
slurm.py      the same as an array of jobs
mixes.py      mixtures of the user's own data sets as an axis
benchmarks.py scores of the harness's tasks
results.py    table and ranking as records
report.py     the same as CSV and Markdown
plots.py      the same as plots
command.py    the options of both commands, and their main program
"""
