"""The parts of the training loop in `train.py`. Importing this package imports torch."""

from training.engine.build import build
from training.engine.due import Events
from training.engine.evaluate import evaluate, sample_texts
from training.engine.outputs import open_log
from training.engine.phase import Phases
from training.engine.state import Checkpoints
from training.engine.step import train_step
from training.engine.summary import check_finite, finish, report_stop
from training.logging.report import update_report

__all__ = [
    "Checkpoints",
    "Events",
    "Phases",
    "build",
    "check_finite",
    "evaluate",
    "finish",
    "open_log",
    "report_stop",
    "sample_texts",
    "train_step",
    "update_report",
]
