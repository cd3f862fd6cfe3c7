"""How far float32 attention may be from the exact result whatever the processor: a bound of each element, in float64.

The error of the eager reference is a yardstick that luck bends: on a few numbers it scatters by several times, and it
depends on the order in which the processor's matrix products sum. A right kernel may therefore also be `U` times
`attention(...)` away, whatever the reference does. Faults of the kind that a test should catch (a token dropped, a sum
in half precision, a wrong row) are orders of magnitude larger.

Rounding adds a relative error of at most U to every result of float32 arithmetic. In a sum of terms x_i these errors
have either sign and mostly cancel: together they stay below U sum |x_i|, where the worst case would be as many times
that as there are terms. To first order:

- A logit, scale sum_d q_d k_d, is off by U A, A = |scale| sum_d |q_d| |k_d|. So is, relatively, its exponential.
- A probability p is an exponential over the sum of all. The sum is off, relatively, by the mean of A under p, and by
  sqrt(L) U for its L additions of one sign, whose errors do not cancel relative to it. Exponential, maximum, share of
  the region and division round once each: 4. Hence rho = A + mean_p(A) + 4 + sqrt(L), relative, in units of U.
- out = sum_l p v: each term is off by p rho |v|, in the worst case all in one direction. Likewise dV = sum_n p g.
- dP = sum_d g_d v_d is off by U B, B = sum_d |g_d| |v_d|.
- dS = p scale (dP - mean_p dP), with t = |dP - mean_p dP|: dP and its mean are off by B + mean_p(B); p in front by
  rho, which t multiplies; p within the mean as well, where only the distance from the mean counts, since the
  probabilities still sum to 1. Hence delta = p |scale| (B + mean_p(B) + t rho + mean_p(t rho)).
- dQ = sum delta |k| and dK = sum delta |q|.
"""

import torch

from instantas.ops import reference

U = 2.0**-24  # half of the distance from 1 to the next float32
_ROUNDINGS = 4  # of a probability: the exponential, its argument, the share of the region, the division


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompt_ids: torch.Tensor,
    weights: torch.Tensor,
    grad: torch.Tensor | None = None,
    *,
    mode: str = "blend",
    scale: float | None = None,
) -> list[torch.Tensor]:
    """The bounds of the result of `ops.regional_attention`; with its gradient, also those of the three gradients.

    Arguments as there, in float64, grad like the query; returns float64 tensors of the shapes of what they bound, in
    units of `U`.
    """
    rows = reference._bank_rows(prompt_ids, key)
    if not query.numel() or rows is None:
        return [torch.zeros_like(t) for t in ((query,) if grad is None else (query, query, key, value))]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    p, share = reference._probabilities(query, key, rows, prompt_ids, weights, mode, scale)  # (B, heads, N, R, L)
    k, v, over = key[rows], value[rows], -1 if mode == "blend" else (-2, -1)
    whole = torch.where(share > 0, share, 1.0) if mode == "blend" else 1.0

    def mean(x):
        return (p * x).sum(over, keepdim=True) / whole

    def products(x, y):
        return torch.einsum("bnhd,brlhd->bhnrl", x, y)

    logit = products(query.abs(), k.abs()) * abs(scale)
    relative = logit + mean(logit) + _ROUNDINGS + key.shape[1] ** 0.5
    bounds = [torch.einsum("bhnrl,brlhd->bnhd", p * relative, v.abs())]
    if grad is not None:
        dp, of_dp = products(grad, v), products(grad.abs(), v.abs())
        spread = (dp - mean(dp)).abs() * relative
        ds = p * abs(scale) * (of_dp + mean(of_dp) + spread + mean(spread))
        bounds.append(torch.einsum("bhnrl,brlhd->bnhd", ds, k.abs()))
        for bank, x, y in ((key, ds, query), (value, p * relative, grad)):
            of_rows = torch.einsum("bhnrl,bnhd->brlhd", x, y.abs())
            bounds.append(torch.zeros_like(bank).index_put_((rows,), of_rows, accumulate=True))
    return bounds
