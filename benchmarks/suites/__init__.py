"""One module per suite, each with ``rows(settings)``."""
