"""The forms that a kernel may take, one form per file: the class, and the function that attaches it to a kernel."""
