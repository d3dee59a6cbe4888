"""Try graders before a training uses them."""
