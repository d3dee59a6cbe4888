"""Graders: what an answer is worth, by OpenAI's contract. Pure functions; the API and the trainer use them.

`schemas` has their fields, `templates` fills `{{item.answer}}`, `similarity` compares texts, `formula` computes what
several scores make together, and `grading` gives an answer its reward.
"""
