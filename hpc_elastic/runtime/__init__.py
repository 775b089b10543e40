"""The runtime: the job as the user sees it, its steps, and how the membership changes between them."""
