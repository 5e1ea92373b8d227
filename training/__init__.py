"""Train GPT-2, dense or Mixture-of-Experts: `python -m training.train --config path/to/config.yaml`."""


def register() -> None:
    """Let Transformers' Auto classes open this package's models with the package's own code.

    Without it, an export with its own Python files (docs/exports.md) needs `trust_remote_code=True` to open.
    """
    from training.weights.hf.modeling import register

    register()
