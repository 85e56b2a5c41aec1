"""The hyper-parameters of a GPT-2, all of them inferred from the file."""

from __future__ import annotations

from dataclasses import dataclass

from .masks import CAUSAL, MaskRule


@dataclass(frozen=True)
class GPT2Config:
    """What the graph and the shapes of a GPT-2 file say about it.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names as in OpenAI's and
    Hugging Face's configurations where these have one.
    """

    n_layer: int  # L
    n_head: int  # H
    n_embd: int  # C
    n_ctx: int  # N, rows of wpe
    vocab_size: int  # V, rows of wte
    n_inner: int  # F, width of the MLP
    head_size: int  # D; C / H unless the graph says otherwise
    layer_norm_epsilon: float = 1e-5
    activation: str = "gelu_tanh"  # a name in activations.ACTIVATIONS
    attn_scale: float = 0.0  # what q·k is multiplied by; 1/sqrt(D) in GPT-2

    # How a file departs from the paper.
    tied: bool = True  # the head is wte itself
    mask: MaskRule = CAUSAL  # how its graph hides keys
    position_offset: int = 0  # row of wpe that the first token takes; 0 in any sound GPT-2
    # What single layers do differently, as (("h.2.mlp.activation", "gelu_erf"), ("h.1.ln_2.epsilon", 1e-3), ...).
    overrides: tuple[tuple[str, float | str], ...] = ()

    def epsilon(self, layer_norm: str) -> float:
        """Epsilon of one layer norm, named "h.0.ln_1", "h.0.ln_2" or "ln_f"."""
        return float(dict(self.overrides).get(f"{layer_norm}.epsilon", self.layer_norm_epsilon))

    def layer_activation(self, layer: int) -> str:
        """The MLP's activation in one layer."""
        return str(dict(self.overrides).get(f"h.{layer}.mlp.activation", self.activation))

    def layer_scale(self, layer: int) -> float:
        """What q·k is multiplied by in one layer."""
        return float(dict(self.overrides).get(f"h.{layer}.attn.scale", self.attn_scale))
