"""Names that settings may take, and that the code behind them knows.

Free of torch, which takes seconds to import: ``--help``, ``--dry-run`` and shell completion read them too.
"""

OBJECTIVES = ("mse", "energy", "mixture_nll")
WEIGHTINGS = ("prediction", "v", "epsilon", "x0", "min_snr")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""diffusers' names: eps, v = a_t eps - s_t x_0, x_0."""
BETA_SCHEDULES = ("cosine", "squaredcos_cap_v2", "linear", "scaled_linear")
PLACEMENTS = ("in_out", "up", "all")
ATTENTION_BACKENDS = ("auto", "sdpa", "xformers")
PRECISIONS = ("auto", "no", "bf16")
CROPS = ("center", "pad")
SAMPLED_LABELS = ("reference", "balanced", "random")
