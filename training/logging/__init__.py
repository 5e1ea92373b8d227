"""What a person sees and keeps of a run: one sink per file, the table of metrics, and the report."""
