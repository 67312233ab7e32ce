"""The additive recurrence on GPUs. Nothing here is imported before a GPU tensor needs it."""
