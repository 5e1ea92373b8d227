"""Which tokens each expert likes: where the routers send the validation text, for the report's table.

Shapes: B batch, T tokens, N = B x T, K experts a token, E experts, S slots, one a counted token id and a last one for
all the others.
"""

from __future__ import annotations

import numpy as np
import torch

from training.config import EvalConfig, ModelConfig
from training.data import Tokenizer
from training.data.byte_unicode import unicode_to_bytes
from training.data.loader import Samples
from training.kernels.attention.table import find_documents
from training.model import GPT

MOST_TOKENS = 65_536  # of the validation text; and never more than an evaluation reads
MOST_IDS = 4096  # token ids that are counted, the most frequent ones
MOST_LAYERS = 12  # spread over the network, the first and the last one among them
MOST_EXPERTS = 64  # of each layer, the first ones
MOST_LIKED = 8  # tokens named for each expert
LEAST_SHARE = 1 / 4096  # of the text that a token is of, to be told from chance: 16 times in MOST_TOKENS ...
LEAST_SEEN = 5  # ... and in a short text so often


def measure_expert_tokens(
    model: GPT, batches: Samples, tokenizer: Tokenizer, config: EvalConfig, *, micro_batch: int, step: int
) -> dict:
    """What experts.json says: for each MoE layer and each of its experts the tokens that it is sent most for its size.

    `batches` are the validation text, `step` says when in the run this is. The model is left as it is.
    """
    n_tokens = min(MOST_TOKENS, config.tokens or MOST_TOKENS)
    n_windows = min(batches.n_samples, max(1, n_tokens // batches.n_positions))
    windows = np.arange(n_windows) * batches.n_samples // n_windows
    tokens_BT, targets_BT = batches.at(windows)
    text_BT = targets_BT >= 0  # the last window may be partly empty

    n_text = int(text_BT.sum())
    least = max(LEAST_SEEN, round(n_text * LEAST_SHARE))
    ids, n_seen = np.unique(tokens_BT[text_BT], return_counts=True)
    frequent = np.argsort(-n_seen, kind="stable")[:MOST_IDS]
    ids_S = np.sort(ids[frequent[n_seen[frequent] >= least]])
    counts = count_routed(model, tokens_BT, text_BT, ids_S, tokenizer.end_of_text, micro_batch)

    texts = token_texts(tokenizer, ids_S)
    layers = [
        {
            "layer": layer,
            "n_experts": counts_SE.shape[1],
            "liked": [
                [{"text": texts[slot], "lift": round(lift, 3), "sent": n_sent} for slot, lift, n_sent in of_expert]
                for of_expert in top_tokens(counts_SE)
            ],
        }
        for layer, counts_SE in counts.items()
    ]
    return {"step": step, "n_tokens": n_text, "seen_at_least": least, "layers": layers}


def count_routed(
    model: GPT, tokens_BT: np.ndarray, text_BT: np.ndarray, ids_S: np.ndarray, end_of_text: int, micro_batch: int
) -> dict[int, np.ndarray]:
    """int32 (S, E) for some MoE layers by their index: how often each token id was sent to each expert."""
    counts = {layer: np.zeros((len(ids_S) + 1, n), np.int32) for layer, n in sampled_layers(model.config).items()}
    slot_BT = np.searchsorted(ids_S, tokens_BT)
    slot_BT[~np.isin(tokens_BT, ids_S)] = len(ids_S)
    device = model.wte.weight.device
    for first in range(0, len(tokens_BT), micro_batch):
        rows = slice(first, first + micro_batch)
        tokens, apart = torch.from_numpy(tokens_BT[rows]), None
        if model.config.isolate_documents:
            apart = find_documents(tokens, end_of_text).to(device)
        routes = model.routed_experts(tokens.to(device), apart)
        slot_N1 = slot_BT[rows][text_BT[rows]][:, None]
        for layer, counts_SE in counts.items():
            topk_ids_NK = routes[layer].cpu().numpy()[text_BT[rows]]
            place_NK = slot_N1 * counts_SE.shape[1] + topk_ids_NK
            counts_SE += np.bincount(place_NK.ravel(), minlength=counts_SE.size).reshape(counts_SE.shape)
    return counts


def sampled_layers(config: ModelConfig) -> dict[int, int]:
    """Index and number of experts of up to MOST_LAYERS of the MoE layers."""
    all_ = [(i, block.ffn.n_experts) for i, block in enumerate(config.layers()) if block.ffn.type == "moe"]
    n = min(len(all_), MOST_LAYERS)
    return dict(all_[round(i * (len(all_) - 1) / max(n - 1, 1))] for i in range(n))


def top_tokens(counts_SE: np.ndarray) -> list[list[tuple[int, float, int]]]:
    """For each expert (slot, lift, times sent there) of the tokens that it is sent most for its size, most first.

    A lift is the share of the token's journeys that end at the expert over that of all tokens': 1 is no liking.
    """
    share_E = counts_SE.sum(axis=0) / counts_SE.sum()
    here_SE = counts_SE[:-1]
    share_SE = here_SE / here_SE.sum(axis=1, keepdims=True)
    lift_SE = np.divide(share_SE, share_E, out=np.zeros_like(share_SE), where=share_E > 0)
    found = []
    for here_S, lift_S in zip(here_SE.T[:MOST_EXPERTS], lift_SE.T, strict=False):
        order = np.lexsort((-here_S, -lift_S))[:MOST_LIKED]
        found.append([(int(i), float(lift_S[i]), int(here_S[i])) for i in order if lift_S[i] > 1])
    return found


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """What each token spells; where that is a part of a character, its bytes as \\xe2."""
    added, byte_of = tokenizer.inner.get_added_tokens_decoder(), unicode_to_bytes()
    return [
        added[id_].content
        if id_ in added
        else bytes(byte_of[c] for c in tokenizer.inner.id_to_token(id_)).decode("utf-8", "backslashreplace")
        for id_ in ids.tolist()
    ]
