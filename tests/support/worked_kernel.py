"""Five inputs of four numbers, for which the authors' codes gave the worked errors of compressed kernels. For tests."""

import numpy as np

X = np.array([[1, 0, 2, 1], [0, 1, -1, 3], [2, 1, 0, 1], [1, -1, 0, 0], [0, 2, 1, -1]], np.float64)
GRAM = X.T @ X
