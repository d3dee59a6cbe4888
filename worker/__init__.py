"""The workers. They claim jobs from the database and run the trainer. `app` never imports this package."""
