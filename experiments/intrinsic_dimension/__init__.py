"""In how few dimensions a model learns a task nearly as well as in all of them."""
