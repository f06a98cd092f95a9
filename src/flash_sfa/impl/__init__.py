"""One module an implementation. Implementations never import one another, except that all may use `reference`."""
