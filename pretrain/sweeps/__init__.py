"""Many runs of one recipe with something varied: what to vary, the runs on this machine or in
SLURM, and what came out.

axes.py       what is varied, and the points of a grid or of one axis at a time
search.py     points that optuna chooses
study.py      the folder on disk: what is asked, and what is known of each run
plan.py       which points there are, each checked before anything starts
launch.py     one run's command line
runner.py     runs side by side, resumable
progress.py   the bar and the lines meanwhile
slurm.py      the same as an array of jobs
report.py     table, ranking, Markdown
plots.py      pictures
command.py    the options of both commands, and the way from them to a report
"""
