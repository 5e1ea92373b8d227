"""Logs of a run: a sink per file, the table of metrics, the timer of phases, the report and the advice."""
