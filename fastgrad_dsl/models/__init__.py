"""A model and its plan: the batches that it takes, its errors on them, what its weights prove."""
