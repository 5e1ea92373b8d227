"""Open an export as any user of Transformers would, without this package, and save the outputs.

    python -P training/weights/open_export.py FOLDER PROBE

PROBE is a safetensors file with "tokens" (B, T), "prompt" (1, P) and "n_new". The program writes PROBE.outputs, with
"logits" (B, T, V) and "continuation" (n_new,); its metadata name the class that opened the folder.
"""

import json
import sys


def main(folder: str, probe: str) -> None:
    """Run the command."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    with open(f"{folder}/config.json", encoding="utf-8") as file:  # noqa: PTH123 (as short as it can be)
        own_code = "auto_map" in json.load(file)  # code that this package wrote: trust it
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=own_code)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)
    inputs = load_file(probe)
    n_new = int(inputs["n_new"])
    with torch.inference_mode():
        logits = model(inputs["tokens"]).logits
        options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(inputs["prompt"], attention_mask=torch.ones_like(inputs["prompt"]), **options)
        model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=1, pad_token_id=0)  # as a user would
    assert "training" not in sys.modules, "the export needs this package"
    metadata = {"model": type(model).__name__, "version": transformers.__version__, "n_vocab": str(len(tokenizer))}
    outputs = {"logits": logits.contiguous(), "continuation": tokens[0, inputs["prompt"].shape[1] :].clone()}
    save_file(outputs, f"{probe}.outputs", metadata=metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
