"""Lines about options that are allowed, but together change another option or keep a part from learning."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from training.config import BlockConfig, Config, ModelConfig, MoEConfig, OptimConfig


def notices(config: Config) -> Iterator[str]:
    """Yield one line for each, with the option's name, its effect and the way out."""
    model = config.model
    if model.logit_softcap is not None and model.logit_softcap < 5:
        yield f"model.logit_softcap: {model.logit_softcap:g} keeps probabilities nearly uniform; use 15 to 50"
    if model.n_positions == 1:
        yield "model.n_positions: 1 lets a token see only itself, so queries and keys learn nothing; use 2 or more"
    for name, problem in _optim_notices(config.optim):
        yield f"optim.{name}: {problem}"
    first = next((group for group in config.optim.groups if fnmatchcase("wte.weight", group.match)), None)
    if first is not None and first.freeze and model.tie_head:
        tied = "wte.weight is also the output projection (model.tie_head), which is frozen with it"
        yield f"optim.groups: {tied}; set tie_head: false to train that one"
    if model.n_embd == 1:
        yield "model.n_embd: 1 leaves a norm no differences between channels, so nothing is learned; use 2 or more"
    for i, source in enumerate(config.data.sources):
        paths = getattr(source, "paths", ())
        for path in sorted({path for path in paths if paths.count(path) > 1}):
            advice = "to repeat text, list it in several sources and give each a weight"
            yield f"data.sources.{i}.paths: {path} is listed more than once, but read once; {advice}"
    for i, block in enumerate(model.blocks):
        for name, problem in _block_notices(block, model):
            yield f"model.blocks.{i}.{name}: {problem}"


def schedule_notices(config: Config) -> Iterator[str]:
    """Yield one line for each length in steps that does not fit into the run; `steps` is resolved.

    A share of the run fits.
    """
    fitted = config.schedule.fitted(config.steps)
    for name in ("warmup_steps", "decay_steps"):
        before = getattr(config.schedule, name, None)
        if before is not None and before != (after := getattr(fitted, name)):
            yield f"schedule.{name}: {before} does not fit into steps {config.steps}; this run uses {after}"


def _optim_notices(optim: OptimConfig) -> Iterator[tuple[str, str]]:
    decay, eps = getattr(optim, "weight_decay", 0.0), getattr(optim, "eps", 0.0)
    for name in ("learning_rate", "muon_learning_rate"):
        if (peak := getattr(optim, name, 0.0)) * decay >= 1:
            yield (
                "weight_decay",
                f"{decay:g} x {name} {peak:g} is 1 or more, which erases the weights; lower one of both",
            )
    for i, group in enumerate(optim.groups):
        if (group.learning_rate or 0.0) * (group.weight_decay or 0.0) >= 1:
            yield f"groups.{i}.weight_decay", "times its learning rate is 1 or more, which erases the weights; lower it"
    if optim.grad_clip is not None and optim.grad_clip <= eps:
        yield "grad_clip", f"{optim.grad_clip:g} is not above eps {eps:g}, so updates vanish; raise grad_clip"


def _block_notices(block: BlockConfig, model: ModelConfig) -> Iterator[tuple[str, str]]:
    if block.mixer.window == 1 and model.n_positions > 1:
        yield "mixer.window", "1 lets a token see only itself, so queries and keys learn nothing; use 2 or more"
    normalized = {name: getattr(block.mixer, name, None) for name in ("kv_rank", "q_rank")}
    if getattr(block.mixer, "qk_norm", False):
        normalized["qk_norm"] = block.mixer.head_dim or model.n_embd // model.n_head
    for name, width in normalized.items():
        if width == 1:
            yield f"mixer.{name}", "RMSNorm of 1 channel is its sign, so almost nothing is learned; use 2 or more"
    softcap = getattr(block.mixer, "softcap", None)
    if softcap is not None and softcap < 1:
        yield "mixer.softcap", f"{softcap:g} makes attention nearly uniform; use 20 to 50"
    if not isinstance(ffn := block.ffn, MoEConfig):
        return
    has_losses = ffn.z_loss_weight > 0 or ffn.balance in ("switch", "both")
    learns = f"the router learns {'only from its auxiliary losses' if has_losses else 'nothing'}"
    if ffn.top_k == 1 and ffn.is_renormalized:
        yield "ffn.renormalize", f"true with top_k 1 makes each weight 1: {learns}; null lets it learn from the text"
    elif ffn.n_experts == 1 and ffn.scoring == "softmax":
        yield "ffn.n_experts", f"the softmax of 1 score is 1: {learns}; use type mlp, or scoring sigmoid"
    if ffn.capacity_factor is not None and ffn.capacity_factor < 1:
        dropped = f"drops at least {1 - ffn.capacity_factor:.0%} of the assignments"
        yield "ffn.capacity_factor", f"{ffn.capacity_factor:g} {dropped} in training; use 1 or more, or null"
