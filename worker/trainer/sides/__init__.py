"""The sides of an evaluation or of a labelling: models that answer prompts, score answers, or are asked about them.

Only one model is in memory at a time. Several ranks sample and score different batches. Each batch is that of a single
rank, so the results are too.
"""
