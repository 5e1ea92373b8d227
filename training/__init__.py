"""Trains GPT-2, dense or Mixture-of-Experts: `python -m training.train --config path/to/config.yaml`."""


def register() -> None:
    """Let Transformers' Auto classes open this package's models with the package's own code.

    Without it, an export that has no native home is opened with `trust_remote_code=True` and the file it carries.
    """
    from training.weights.hf.modeling import register

    register()
