"""Many runs of one recipe with something varied: what to vary, the runs on this machine or in SLURM, and what came out.

axes.py       what is varied, and the points of a grid or of one axis at a time
search.py     points that optuna chooses
study.py      the folder on disk: what is asked, and what is known of each run
launch.py     one run's command line
runner.py     runs side by side, resumable
report.py     table, ranking, Markdown;  plots.py  pictures
"""
