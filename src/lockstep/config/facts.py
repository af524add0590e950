"""What the resolver must know of a model, as numbers. The engine fills it from the model's files."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED_BYTES = {"q4_0": 18 / 32, "q8_0": 34 / 32, "int8": 34 / 32, "bf16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Shape and size of one model.

    `weight_bytes` is the size as stored, `widened_bytes` what it grows by where kernels read blocks as they are:
    integers of 5 and 6 bits are held in 8. `stored_dtype` is the storage type of most weights, in torch's word
    ("bfloat16") or, for block formats, the format's ("q4_1"). Without a mixture of experts there are 0 of them.
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    context_length: int
    num_parameters: int
    weight_bytes: int
    stored_dtype: str
    widened_bytes: int = 0
    num_experts: int = 0
    num_expert_parameters: int = 0

    def held_weight_bytes(self, dtype: str, quantization: str = "none", *, copies: int = 1) -> int:
        """Bytes of all weights in the form that they are held in, with so many copies of all but the experts.

        Experts are values of `dtype` whatever `quantization` says: no kernel reads packed ones.
        """
        others = self.num_parameters - self.num_expert_parameters
        if quantization == "stored":
            held = (self.weight_bytes + self.widened_bytes) * others // self.num_parameters
        else:
            held = int(others * _QUANTISED_BYTES.get(quantization, DTYPE_BYTES[dtype]))
        return self.num_expert_parameters * DTYPE_BYTES[dtype] + held * copies

    @property
    def overflows_float16(self) -> bool:
        """True where sums along the residual stream pass the largest number of float16, 65504."""
        return self.architecture == "Gemma3ForCausalLM"

    def kv_bytes_per_token(self, dtype: str, tp: int = 1) -> int:
        """Bytes of keys and values that the fullest rank of `tp` keeps for one token, all layers together.

        With more ranks than KV heads, each rank holds one head, so that some heads are kept more than once.
        """
        heads = -(-self.num_kv_heads // tp)
        return 2 * self.num_layers * heads * self.head_dim * DTYPE_BYTES[dtype]

    def valid_tp(self) -> tuple[int, ...]:
        """Tensor parallel sizes with whole KV heads on every rank, or several ranks to a KV head that share its
        query heads evenly."""
        group = self.num_heads // self.num_kv_heads
        shared = [ranks * self.num_kv_heads for ranks in range(2, group + 1) if group % ranks == 0]
        return (*range(1, self.num_kv_heads + 1), *shared)
