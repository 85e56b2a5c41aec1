"""GPT-2 in PyTorch, under OpenAI's parameter names: for training, and for an export with the zoo's graph.

Architecture: Radford et al. 2019 (pre-LN blocks, learned positions, tied head); the tanh GELU is Hendrycks and Gimpel's
(arXiv 1606.08415). Shapes: B batch, T positions, C n_embd, H heads, D = C / H, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Config:
    n_vocab: int
    n_ctx: int
    n_embd: int
    n_layer: int
    n_head: int
    dropout: float = 0.0  # of what each sublayer adds to the residual stream


class Conv1D(nn.Module):
    """y = x W + b, with W stored (in, out) as OpenAI's checkpoints store it."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, in) -> (B, T, out)
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.weight.size(1))


class Attention(nn.Module):
    bias: Tensor

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.n_head = c.n_head
        # OpenAI's name for the causal mask: 1 where position i may see position j
        self.register_buffer("bias", torch.tril(torch.ones(c.n_ctx, c.n_ctx)).view(1, 1, c.n_ctx, c.n_ctx))
        self.c_attn = Conv1D(c.n_embd, 3 * c.n_embd, 0.02)
        self.c_proj = Conv1D(c.n_embd, c.n_embd, 0.02 / math.sqrt(2 * c.n_layer))

    def heads(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, H, T, D)
        return x.view(*x.size()[:-1], self.n_head, x.size(-1) // self.n_head).permute(0, 2, 1, 3)

    def textbook(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax(q k^T / sqrt(D), masked) v, spelt as the zoo's graph spells it."""
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))  # (B, H, T, T)
        n_q, n_k = w.size(-2), w.size(-1)
        b = self.bias[:, :, n_k - n_q : n_k, :n_k]
        return torch.matmul(F.softmax(w * b - 1e4 * (1 - b), dim=-1), v)  # (B, H, T, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, T, C), (2, B, H, T, D)
        q, k, v = (self.heads(part) for part in self.c_attn(x).split(x.size(-1), dim=2))
        if self.training:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = self.textbook(q, k, v)
        a = a.permute(0, 2, 1, 3).contiguous()
        a = a.view(*a.size()[:-2], a.size(-2) * a.size(-1))
        return self.c_proj(a), torch.stack((k, v))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(c.n_embd, 4 * c.n_embd, 0.02)
        self.c_proj = Conv1D(4 * c.n_embd, c.n_embd, 0.02 / math.sqrt(2 * c.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        # the same function twice: PyTorch's fused one trains faster, the spelt-out one exports as the zoo's nodes
        return self.c_proj(F.gelu(h, approximate="tanh") if self.training else gelu_tanh(h))


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd), Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd), MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, past = self.attn(self.ln_1(x))
        x = x + self.dropout(a)
        return x + self.dropout(self.mlp(self.ln_2(x))), past


class GPT2(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.n_vocab, c.n_embd)
        self.wpe = nn.Embedding(c.n_ctx, c.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)

    def forward(self, input1: Tensor) -> tuple[Tensor, ...]:
        """ids (d1, d2, T) or (B, T) -> last hidden state (..., T, C), then each layer's past (2, B, H, T, D)."""
        ids = input1.view(-1, input1.size(-1))  # (B, T)
        positions = torch.arange(ids.size(-1), dtype=torch.long, device=ids.device).unsqueeze(0)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        pasts = []
        for block in self.h:
            x, past = block(x)
            pasts.append(past)
        return self.ln_f(x).view(*input1.size(), x.size(-1)), *pasts

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.wte.weight)  # (..., C) -> (..., V)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per token; ids and targets (B, T)."""
        logits = self.logits(self(ids)[0])
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1))
