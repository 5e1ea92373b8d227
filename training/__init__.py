"""Train GPT-2, dense or Mixture-of-Experts: `python -m training.train --config path/to/config.yaml`."""
