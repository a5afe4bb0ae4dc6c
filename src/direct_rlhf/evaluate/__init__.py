"""What a model can do: general tasks, conversation, toxicity; counts of scored and failed beside every mean."""
