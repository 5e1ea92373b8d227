"""Find the tokens that the router prefers to send to each expert, for experts.json and the report.

Shapes: B batch, T tokens, N = B x T tokens, K experts per token, E experts, S slots: one for each counted token id and
a last one for all others.
"""

import numpy as np

from training.batch import Batch
from training.config import EvalConfig, ModelConfig
from training.data import Samples, Tokenizer
from training.data.tiktoken_encode import unicode_to_bytes
from training.model import GPT

MAX_TOKENS = 65_536  # of the validation text to read, at most `eval.tokens`
MAX_IDS = 4096  # token ids to count: the most frequent ones
MAX_LAYERS = 12  # evenly spaced over the network, first and last included
MAX_EXPERTS = 64  # of each layer: the first ones
MAX_TOP_TOKENS = 8  # per expert
MIN_SHARE = 1 / 4096  # count a token if it is this share of the text: 16 of MAX_TOKENS, enough to rule out chance
MIN_COUNT = 5  # and occurs this often, in a short text


def measure_expert_tokens(
    model: GPT, samples: Samples, tokenizer: Tokenizer, config: EvalConfig, *, micro_batch: int, step: int
) -> dict:
    """Return the contents of experts.json: for each MoE layer and expert the tokens with the largest lift.

    `samples` are the validation text. Leaves the model unchanged.
    """
    batch = samples.batch(np.concatenate(samples.evenly_spaced(min(MAX_TOKENS, config.tokens or MAX_TOKENS))))
    tokens_N = batch.tokens_BT[batch.targets_BT >= 0].numpy()  # the last sample may be padded
    min_count = max(MIN_COUNT, round(len(tokens_N) * MIN_SHARE))
    ids, count = np.unique(tokens_N, return_counts=True)
    frequent = np.argsort(-count, kind="stable")[:MAX_IDS]
    ids_S = np.sort(ids[frequent[count[frequent] >= min_count]])
    texts = token_texts(tokenizer, ids_S)
    layers = [
        {
            "layer": layer,
            "n_experts": count_SE.shape[1],
            "liked": [
                [{"text": texts[slot], "lift": round(lift, 3), "sent": n} for slot, lift, n in expert]
                for expert in top_tokens(count_SE)
            ],
        }
        for layer, count_SE in count_routed(model, batch, ids_S, micro_batch).items()
    ]
    return {"step": step, "n_tokens": len(tokens_N), "seen_at_least": min_count, "layers": layers}


def count_routed(model: GPT, batch: Batch, ids_S: np.ndarray, micro_batch: int) -> dict[int, np.ndarray]:
    """Return, by MoE layer, int32 (S, E): how often each token id was sent to each expert."""
    counts = {layer: np.zeros((len(ids_S) + 1, n), np.int32) for layer, n in sampled_layers(model.config).items()}
    for first in range(0, len(batch.tokens_BT), micro_batch):
        part = batch.rows(slice(first, first + micro_batch))
        on_device = part.to(model.wte.weight.device)
        routes = model.routed_experts(on_device.tokens_BT, on_device.documents)
        is_text_BT = part.targets_BT.numpy() >= 0
        tokens_N1 = part.tokens_BT.numpy()[is_text_BT][:, None]
        slot_N1 = np.where(np.isin(tokens_N1, ids_S), np.searchsorted(ids_S, tokens_N1), len(ids_S))
        for layer, count_SE in counts.items():
            expert_NK = routes[layer].cpu().numpy()[is_text_BT]
            cell_NK = slot_N1 * count_SE.shape[1] + expert_NK
            count_SE += np.bincount(cell_NK.ravel(), minlength=count_SE.size).reshape(count_SE.shape)
    return counts


def sampled_layers(config: ModelConfig) -> dict[int, int]:
    """Return the number of experts of up to MAX_LAYERS MoE layers, by layer."""
    layers = [(i, block.ffn.n_experts) for i, block in enumerate(config.layers()) if block.ffn.type == "moe"]
    n = min(len(layers), MAX_LAYERS)
    return dict(layers[round(i * (len(layers) - 1) / max(n - 1, 1))] for i in range(n))


def top_tokens(count_SE: np.ndarray) -> list[list[tuple[int, float, int]]]:
    """Return for each expert up to MAX_TOP_TOKENS of (slot, lift, count), largest lift first.

    The lift is the expert's share of the token's assignments over its share of all assignments; above 1 only.
    """
    share_E = count_SE.sum(axis=0) / count_SE.sum()
    counted_SE = count_SE[:-1]
    share_SE = counted_SE / counted_SE.sum(axis=1, keepdims=True)
    lift_SE = np.divide(share_SE, share_E, out=np.zeros_like(share_SE), where=share_E > 0)
    experts = []
    for count_S, lift_S in zip(counted_SE.T[:MAX_EXPERTS], lift_SE.T, strict=False):
        order = np.lexsort((-count_S, -lift_S))[:MAX_TOP_TOKENS]
        experts.append([(int(i), float(lift_S[i]), int(count_S[i])) for i in order if lift_S[i] > 1])
    return experts


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """Return the text of each token; bytes that are not whole characters are escaped: \\xe2."""
    added, byte_of = tokenizer.inner.get_added_tokens_decoder(), unicode_to_bytes()
    return [
        added[id_].content
        if id_ in added
        else bytes(byte_of[c] for c in tokenizer.inner.id_to_token(id_)).decode("utf-8", "backslashreplace")
        for id_ in ids.tolist()
    ]
