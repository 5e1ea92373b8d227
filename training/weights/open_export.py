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
    with torch.inference_mode():
        logits = model(inputs["tokens"]).logits
        tokens = greedy(model, inputs["prompt"], int(inputs["n_new"]))
    make_documented_calls(model, tokenizer, max_tokens=inputs["tokens"].shape[1])
    save_and_open(model, tokenizer, f"{probe}.again", own_code)
    metadata = {"model": type(model).__name__, "version": transformers.__version__, "n_vocab": str(len(tokenizer))}
    outputs = {"logits": logits.contiguous(), "continuation": tokens[0, inputs["prompt"].shape[1] :].clone()}
    save_file(outputs, f"{probe}.outputs", metadata=metadata)


def greedy(model, prompt_1T, n_new: int):
    """Return the prompt and its likeliest continuation, which may contain end-of-text tokens."""
    end, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    mask_1T = prompt_1T.new_ones(prompt_1T.shape)
    tokens_1T = model.generate(prompt_1T, attention_mask=mask_1T, max_new_tokens=n_new, do_sample=False)
    model.generation_config.eos_token_id = end
    return tokens_1T


def make_documented_calls(model, tokenizer, max_tokens: int) -> None:
    """Make the calls of Transformers' documentation, without options that a user need not set."""
    from transformers import pipeline

    context = model.config.max_position_embeddings
    long_text = " ".join(map(str, range(context + 1)))
    assert tokenizer(long_text, truncation=True, return_tensors="pt")["input_ids"].shape[1] <= context, "no truncation"
    assert model.generation_config.max_length == context + 1, "no limit of the generated length"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    generator(["a", "a longer text"], batch_size=2, truncation=True, max_new_tokens=1)
    if context <= max_tokens:
        generator("a")
        generator(long_text, truncation=True)
    else:  # a full context of a larger model would take too long
        generator("a", max_new_tokens=8)


def save_and_open(model, tokenizer, folder: str, own_code: bool) -> None:
    """Save all but the weights, whose copy might not fit on the disk, and open it again."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(folder)
    AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    GenerationConfig.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
    assert "training" not in sys.modules, "the export needs this package"
