"""Sources and targets of weights: `init_from`, upcycling, exports and Hugging Face's formats."""
