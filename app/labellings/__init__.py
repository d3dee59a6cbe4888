"""Labellings: models answer prompts, labellers say which answers are better, and a file of ranked answers is made."""
