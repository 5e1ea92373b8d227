"""Open exports with the installed Transformers, without this package; the tests also start it under another version.

`python tests/open_exports.py FOLDER ...` prints one line of JSON per folder.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent.parent / "training/weights"))
from open_export import make_documented_calls  # without this package


def open_export(folder: Path) -> dict:
    """Compare the model with the logits in FOLDER.expected, and save it as FOLDER.again."""
    expected = load_file(folder.with_suffix(".expected"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    x_BT = expected["x_BT"]
    with torch.no_grad():
        difference = (model(x_BT).logits - expected["logits_BTV"]).abs().max()
        new = model.generate(x_BT[:1, :4], max_new_tokens=12, min_new_tokens=12, do_sample=False)
    model.save_pretrained(folder.with_suffix(".again"))
    if (folder / "tokenizer.json").exists():
        make_documented_calls(model, transformers.AutoTokenizer.from_pretrained(folder), max_tokens=x_BT.shape[1])
    return {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "difference": difference.item(),
        "generated": new[0, 4:].tolist(),
        "defaults": (defaults := type(model.config)().to_dict()),
        # The fields that only this architecture has.
        "fields": sorted(defaults.keys() - transformers.PretrainedConfig().to_dict().keys()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        print(json.dumps(open_export(Path(argument)), default=str))
