"""Studies of many runs: cells, the claims that workers hold on them, the workers, and the results.

A study is a base config with axes. Each of its cells is one run, named by the hash of its config. Any number of workers
on any number of machines claim cells from the study's folder; `claims.py` says why no cell is lost or counted twice.
"""
