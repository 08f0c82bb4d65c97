"""Whether biases are special: all of them, few of them, or as many other parameters."""
