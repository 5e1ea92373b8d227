"""The parts of the training loop in `train.py`. Importing this package imports torch."""

from training.engine.build import build
from training.engine.evaluate import evaluate, sample_texts, score_tasks
from training.engine.loop import Events, Phases, check_finite, is_over, report_stop
from training.engine.outputs import finish, open_log
from training.engine.state import Checkpoints
from training.engine.step import train_step
from training.engine.trace import Tracer
from training.kernels.compiler import compiled
