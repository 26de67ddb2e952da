"""Pictures of a trained model: the tool, and what others sample with."""
