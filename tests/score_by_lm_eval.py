"""Score tasks by lm-eval's own `hf` model; run with lm-eval's folder on PYTHONPATH.

    python tests/score_by_lm_eval.py EXPORT OUT.json BATCH TASK.yaml ...

A TASK.yaml is lm-eval's. OUT.json: by task the results, and the log-likelihoods of each item's answers with True if
all tokens are the likeliest; and the seconds that scoring took.
"""

import json
import logging
import sys
import time
from pathlib import Path


def main(export: str, out: str, batch: str, *tasks: str) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.disable(logging.WARNING)
    model = HFLM(pretrained=export, device="cpu", dtype="float32", batch_size=int(batch), trust_remote_code=True)
    began = time.perf_counter()
    output = lm_eval.simple_evaluate(model=model, tasks=list(tasks), log_samples=True, bootstrap_iters=0)
    seconds = time.perf_counter() - began
    answers = {
        name: [
            [[float(nats), str(is_likeliest) == "True"] for ((nats, is_likeliest),) in sample["resps"]]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        for name, samples in output["samples"].items()
    }
    results = {
        name: {key.partition(",")[0]: value for key, value in values.items()}
        for name, values in output["results"].items()
    }
    Path(out).write_text(json.dumps({"results": results, "answers": answers, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
