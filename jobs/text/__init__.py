"""Text classification: does the customer recommend it, or what it is."""
