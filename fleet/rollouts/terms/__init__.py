"""Terms of a rollout, one module for each group of them: what they are, and what makes no sense."""
