"""Use exports with their own Python files as any user of Transformers would: `python -P open_custom.py FOLDER ...`."""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parent.parent / "training/weights"))
from open_export import make_documented_calls  # without this package

torch.set_num_threads(1)
warnings.simplefilter("ignore")
print(transformers.__version__)

for folder in sys.argv[1:]:
    saved = torch.load(f"{folder}.pt")
    x, expected = saved["tokens"], saved["logits"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "training" not in sys.modules

    def new(tokens, model=model, **options):
        return model.generate(tokens, max_new_tokens=12, pad_token_id=0, **({"do_sample": False} | options))

    with torch.no_grad():
        assert (model(x).logits - expected).abs().max() < 1e-5
        # As in every causal model of Transformers, the loss predicts each next token.
        log_p = expected[:, :-1].log_softmax(-1)
        loss = -log_p.gather(2, x[:, 1:, None]).mean()
        assert (model(x, labels=x).loss - loss).abs() < 1e-5
        # Greedy and beam search, with and without a cache.
        greedy = new(x[:, :6])
        assert torch.equal(greedy, new(x[:, :6], use_cache=False))
        assert torch.equal(new(x[:, :6], num_beams=3), new(x[:, :6], num_beams=3, use_cache=False))
        # Padding on the left changes nothing.
        padded = torch.stack([torch.cat([torch.zeros(3, dtype=torch.int64), x[0, :6]]), x[1, :9]])
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, :3] = 0
        assert torch.equal(new(padded, attention_mask=mask)[0, 9:], greedy[0, 6:])
        assert (model(padded, attention_mask=mask).logits[0, 3:] - expected[0, :6]).abs().max() < 1e-5
        # Packed documents, separated by positions that restart at 0.
        packed, positions = torch.cat([x[:1, :6], x[1:, :9]], dim=1), torch.tensor([[*range(6), *range(9)]])
        isolated = torch.cat([expected[:1, :6], expected[1:, :9]], dim=1)
        assert (model(packed, position_ids=positions).logits - isolated).abs().max() < 1e-5
        # In bf16, routers stay float32.
        half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
        assert (half(x).logits - expected).abs().max() < 0.2
        types = {tensor.dtype for name, tensor in half.state_dict().items() if "router" in name}
        assert types == {torch.float32}
    make_documented_calls(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True), max_tokens=48)
    # Fine-tune, save and open again.
    model.train()
    model(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    model.save_pretrained(f"{folder}-again")
    assert list(Path(f"{folder}-again").glob("modeling_*.py"))
    again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", trust_remote_code=True)
    with torch.no_grad():
        assert (again(x).logits - expected).abs().max() < 1e-5
