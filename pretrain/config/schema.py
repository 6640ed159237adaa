"""The typed recipe: everything one run is, checked before anything starts.

Each section is frozen and refuses unknown keys. ``kind`` chooses a component and with it the fields that are allowed. Units are part of
a field's name or of its description. Hugging Face's names are used wherever it has one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config.data_schema import DataConfig
from pretrain.config.section import NonNegative, Positive, Section, Share

# --- model ----------------------------------------------------------------------------------------------------------------------


class GroupedQueryAttention(Section):
    """Grouped-query attention (Ainslie et al. 2023); equal head counts make it multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    qk_norm: bool = Field(False, description="RMSNorm over each head of queries and keys, before RoPE")
    kernel: Literal["sdpa", "reference"] = Field("sdpa", description="'reference' is the plain fp32 form that tests compare with")


class Rope(Section):
    """Rotary position embedding (Su et al. 2021), half-split layout as in Hugging Face's Llama."""

    kind: Literal["rope"] = "rope"
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0


class AllMoE(Section):
    """Every layer is a mixture of experts."""

    kind: Literal["all_moe"] = "all_moe"


class AllDense(Section):
    """No layer is a mixture of experts."""

    kind: Literal["all_dense"]


class EveryNth(Section):
    """Layer i is a mixture of experts where (i + 1) % n == 0, Hugging Face's ``decoder_sparse_step``."""

    kind: Literal["every_nth"]
    n: Positive


class FirstKDense(Section):
    """The first k layers are dense, the others mixtures of experts (DeepSeek's ``first_k_dense_replace``)."""

    kind: Literal["first_k_dense"]
    k: NonNegative


LayerPattern = Annotated[AllMoE | AllDense | EveryNth | FirstKDense, Field(discriminator="kind")]


class MoEBase(Section):
    """What both kinds of MoE layer share."""

    num_experts: Positive
    top_k: Positive
    moe_intermediate_size: Positive
    norm_topk_prob: bool = Field(True, description="the chosen experts' weights are renormalised to sum to one")
    aux_loss_weight: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of E/k * sum_e f_e p_e, summed over MoE layers")
    z_loss_weight: Annotated[float, Field(ge=0)] = Field(0.001, description="weight of mean(logsumexp(router logits)^2), summed over MoE layers")
    balance_scope: Literal["micro_batch", "global_batch"] = Field(
        "micro_batch", description="over which tokens f_e is counted; 'global_batch' costs one more forward pass a micro batch"
    )

    @model_validator(mode="after")
    def _top_k_fits(self) -> MoEBase:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.num_experts} experts")
        return self


class DroplessMoE(MoEBase):
    """No token is dropped: rows travel by all-to-all to their experts, on DeepSpeed's AutoEP layer. Any ZeRO stage."""

    kind: Literal["dropless"] = "dropless"
    num_shared_experts: NonNegative = Field(0, description="experts of the same width that see every token, ungated")
    expert_kernel: Literal["auto", "loop", "grouped_mm"] = Field("auto", description="'auto': grouped_mm for bf16 on CUDA, else a loop")


class DeepSpeedMoE(MoEBase):
    """DeepSpeed's native layer: capacity, drops or padding, noisy gates, residual experts. ZeRO 0, 1 and 2."""

    kind: Literal["deepspeed"]
    capacity_factor: Annotated[float, Field(gt=0)] = Field(1.25, description="room per expert in training, times tokens * top_k / num_experts")
    eval_capacity_factor: Annotated[float, Field(gt=0)] = 2.0
    min_capacity: NonNegative = Field(4, description="tokens")
    drop_tokens: bool = Field(True, description="false pads every expert to the fullest one, and drops nothing")
    use_rts: bool = Field(False, description="random token selection when an expert is full (top_k 1 only)")
    noisy_gate_policy: Literal["Jitter", "RSample"] | None = None
    top2_2nd_expert_sampling: bool = Field(False, description="Gumbel noise on the second choice (top_k 2 only)")
    use_residual: bool = Field(False, description="a dense expert beside the routed ones, mixed by a learned coefficient (PR-MoE)")
    causal: bool = Field(True, description="false acknowledges that capacity drops let later tokens push out earlier ones")


class ModelConfig(Section):
    """A decoder-only transformer: embedding, pre-norm blocks of attention and feed-forward, final RMSNorm, head. No biases."""

    vocab_size: Positive | None = Field(None, description="tokens; taken from the tokenizer when left out")
    vocab_multiple: Positive = Field(64, description="the embedding is padded to a multiple of this; padding is never sampled nor exported")
    hidden_size: Positive
    num_hidden_layers: Positive
    intermediate_size: Positive | None = Field(None, description="width of dense feed-forwards; needed where the pattern has dense layers")
    max_position_embeddings: Positive = Field(2048, description="longest sequence in tokens")
    attention: GroupedQueryAttention
    position: Rope = Rope()
    layer_pattern: LayerPattern = AllMoE()
    moe: Annotated[DroplessMoE | DeepSpeedMoE, Field(discriminator="kind")] | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: Annotated[float, Field(gt=0)] = Field(0.02, description="standard deviation; residual projections get it / sqrt(2 * layers)")
    output_z_loss_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of mean(logsumexp(output logits)^2)")
    loss_chunk_tokens: Positive = Field(1024, description="tokens whose logits stand in memory at once during training")

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer ``index`` (from 0) is a mixture of experts."""
        match self.layer_pattern:
            case AllMoE():
                return True
            case AllDense():
                return False
            case EveryNth(n=n):
                return (index + 1) % n == 0
            case FirstKDense(k=k):
                return index >= k

    @property
    def moe_layers(self) -> list[int]:
        return [index for index in range(self.num_hidden_layers) if self.is_moe_layer(index)]

    @property
    def padded_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


# --- training -------------------------------------------------------------------------------------------------------------------


class TrainConfig(Section):
    """Sizes of one run. The number of steps and the gradient accumulation are derived, never given."""

    sequence_length: Positive = Field(description="tokens")
    micro_batch_size: Positive = Field(description="sequences a rank holds at once")
    global_batch_size: Positive = Field(description="sequences a step, over all ranks")
    train_tokens: Positive = Field(description="tokens of the whole run, rounded up to whole steps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="'auto': bf16 where the hardware multiplies it natively, else fp32"
    )
    activation_checkpointing: bool = Field(False, description="recompute each block in the backward pass instead of keeping its activations")
    grad_clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0 switches clipping off")

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def num_steps(self) -> int:
        return -(-self.train_tokens // self.tokens_per_step)


class AdamWConfig(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="of matrices; norms and embeddings are never decayed")
    router_learning_rate: Annotated[float, Field(gt=0)] | None = None
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None


class SGDConfig(Section):
    """Plain stochastic gradient descent: for numerical comparisons."""

    kind: Literal["sgd"]
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    router_learning_rate: Annotated[float, Field(gt=0)] | None = None
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None


class ScheduleConfig(Section):
    """The learning rate as a factor of its peak, a pure function of the step.

    ``wsd``: warm-up, constant, then a linear decay over the last ``decay_share`` of the steps.
    ``linear`` and ``cosine`` decay from the end of the warm-up to the end of the run.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: NonNegative = 0
    min_learning_rate_ratio: Share = Field(0.1, description="last learning rate / peak")
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of all steps that 'wsd' decays over")


class ParallelConfig(Section):
    ep_size: Positive = Field(1, description="ranks that share one set of experts")


class CheckpointConfig(Section):
    interval_steps: Positive = 1000
    keep_last: Positive = Field(2, description="newest checkpoints that are kept")
    keep_best: bool = Field(False, description="also keep the one with the lowest validation loss")


class ValidationConfig(Section):
    interval_steps: Positive = 500
    max_windows: Positive | None = Field(None, description="sequences an in-loop validation reads; the last one of a run reads all")


class LoggingConfig(Section):
    interval_steps: Positive = 10
    tensorboard: bool = True


class Recipe(Section):
    """A whole run. ``name`` only chooses the default folders."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegative = 1234
    run_path: str | None = Field(None, description="folder of the run; runs/<name> by default")
    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig
    optimizer: Annotated[AdamWConfig | SGDConfig, Field(discriminator="kind")]
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def data_path(self) -> str:
        return self.data.path or f"data/{self.name}"

    @property
    def output_path(self) -> str:
        return self.run_path or f"runs/{self.name}"
