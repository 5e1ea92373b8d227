"""What the training loop is made of: start, step, evaluation, memory, state, resume and end of a run."""
