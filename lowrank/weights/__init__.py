"""One file a form: the class, and the function that makes it."""
