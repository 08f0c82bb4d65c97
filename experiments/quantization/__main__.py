"""Compares bases in fewer bits: `python -m experiments.quantization [--quick] [--task=T] [--rows=a,b] [--phases=p]`.

Each base is scored untuned and with LoRA on top, on the two tasks of the comparison of methods. Flags and cells are as
there: kill it and start it again.
"""

from absl import app

from experiments.quantization.table import write
from experiments.study.run import main

if __name__ == "__main__":
    app.run(lambda argv: main("quantization", write))
