"""How a study of `experiments/` is run: learning rates on seeds and articles of their own, then scores, tables, plots.

A folder `experiments/NAME` holds `study.py` with an `Experiment`, a README with the table's markers, and `results/`.
"""
