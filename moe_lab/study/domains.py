"""What experts know of the kind of text, and how much of that the bytes alone would tell.

Windows of text are described by the histogram of their experts, or of their bytes, and named by the nearest
centroid of a domain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.trace import RoutingTrace


class Histograms(NamedTuple):
    """Windows of text, W of them, as rows of shares.

    `shares_WF` float64: for experts all layers side by side, F = L*E; for bytes F = 256. `domain_W` indexes
    `domains`; `document_W` tells windows of one document.
    """

    shares_WF: Float[Tensor, "W F"]
    domain_W: Int[Tensor, " W"]
    document_W: Int[Tensor, " W"]
    domains: tuple[str, ...]


class Classification(NamedTuple):
    """How often the nearest centroid names the right domain. `confusion_DD[true, named]` counts windows."""

    accuracy: float
    confusion_DD: Int[Tensor, "D D"]
    domains: tuple[str, ...]

    def __repr__(self) -> str:
        width = max(map(len, self.domains)) + 1
        lines = [f"{100 * self.accuracy:.1f} % of {int(self.confusion_DD.sum()):,} windows named rightly"]
        lines.append(" " * width + "".join(name.rjust(width) for name in self.domains))
        for name, row in zip(self.domains, self.confusion_DD.tolist(), strict=True):
            lines.append(name.ljust(width) + "".join(f"{count:>{width},}" for count in row))
        return "\n".join(lines)


def domain_histograms(trace: RoutingTrace, window: int = 256) -> Histograms:
    """Histograms of experts over consecutive windows of `window` tokens within each document.

    Every layer's E shares sum to 1. A rest at a document's end, and windows with tokens that are missing or
    not valid, are left out. Raises `ValueError` when no window is left, or everything in one was dropped.
    """
    window_T, first_W = _windows(trace, window)
    counts_LWE = trace.counts_by(window_T, len(first_W))
    total_LW1 = counts_LWE.sum(dim=-1, keepdim=True)
    if not total_LW1.all():
        raise ValueError("every assignment of a window was dropped: it has no histogram")
    shares_WF = (counts_LWE.double() / total_LW1).transpose(0, 1).flatten(1)
    return Histograms(shares_WF, trace.domain_T[first_W], trace.document_T[first_W].long(), trace.domains)


def byte_histograms(trace: RoutingTrace, byte_T: UInt8[Tensor, " T"], window: int = 256) -> Histograms:
    """The same windows as `domain_histograms`, described by their bytes: what needs no model to know."""
    _check_bytes(trace, byte_T)
    window_T, first_W = _windows(trace, window)
    cell_T = torch.where(window_T < 0, 0, window_T * 256 + byte_T.long() + 1)
    counts_WF = torch.bincount(cell_T, minlength=len(first_W) * 256 + 1)[1:].view(-1, 256)
    shares_WF = counts_WF.double() / window
    return Histograms(shares_WF, trace.domain_T[first_W], trace.document_T[first_W].long(), trace.domains)


def nearest_centroid(
    train_WF: Float[Tensor, "W F"],
    label_W: Int[Tensor, " W"],
    test_VF: Float[Tensor, "V F"],
    num_labels: int,
    *,
    whiten: bool = False,
) -> Int[Tensor, " V"]:
    """Label each test row by the nearest mean of training rows, in Euclidean distance.

    With `whiten`, in Mahalanobis distance: by the covariance of training rows around their means, nine tenths of
    it and one tenth of its mean variance in every direction (linear discriminant analysis with equal priors).
    A label without training rows is never chosen.
    """
    if whiten:
        sums_DF, count_D = _sums(train_WF, label_W, num_labels)
        around_WF = train_WF - (sums_DF / count_D.clamp(min=1)[:, None])[label_W]
        cov_FF = around_WF.mT @ around_WF / len(around_WF)
        cov_FF = 0.9 * cov_FF + 0.1 * cov_FF.diagonal().mean() * torch.eye(len(cov_FF), dtype=cov_FF.dtype)
        root_FF = torch.linalg.cholesky(cov_FF)
        train_WF, test_VF = (torch.linalg.solve_triangular(root_FF, x.mT, upper=False).mT for x in (train_WF, test_VF))
    sums_DF, count_D = _sums(train_WF, label_W, num_labels)
    return _nearest(test_VF, sums_DF, count_D)


def classify(histograms: Histograms, train: Histograms | None = None, *, whiten: bool = False) -> Classification:
    """Name the domain of each window by the nearest centroid of the others.

    Distances are between square roots of shares (Hellinger's), so that frequent experts do not drown the
    rest. Centroids come from `train`, or, without it, from all documents but the window's own: windows of one
    document are too alike to test each other. `whiten`, with `train` only: see `nearest_centroid`.

    Raises `ValueError` when the two describe different domains or features, and when a domain has no document
    left to learn from.
    """
    if whiten and train is None:
        raise ValueError("whiten=True needs train: the covariance must not come from the windows that are named")
    root_WF, domains = histograms.shares_WF.sqrt(), histograms.domains
    if train is not None:
        if train.domains != domains or train.shares_WF.shape[1] != root_WF.shape[1]:
            raise ValueError(f"train describes domains {train.domains}, not {domains}, or has other features")
        train_WF = train.shares_WF.sqrt()
        named_W = nearest_centroid(train_WF, train.domain_W, root_WF, len(domains), whiten=whiten)
    else:
        named_W = _leave_one_document_out(root_WF, histograms)
    cell_W = histograms.domain_W * len(domains) + named_W
    confusion_DD = torch.bincount(cell_W, minlength=len(domains) ** 2).view(len(domains), -1)
    return Classification(float(confusion_DD.diagonal().sum() / len(cell_W)), confusion_DD, domains)


def byte_explains(trace: RoutingTrace, byte_T: UInt8[Tensor, " T"], *, shuffles: int = 8) -> Float[Tensor, " L"]:
    """By layer, the share of the first expert's entropy that the current byte explains, corrected for chance.

    (I - I0) / (H - I0), with I the mutual information of byte and first expert, H the expert's entropy, and
    I0 the mean of I when bytes are shuffled (few tokens make any two things look related). 0 when the byte
    says nothing, 1 when it decides; 1 also for a layer that always picks the same expert. The adjustment is
    that of Vinh, Epps and Bailey (JMLR 11, 2010, section 4) for clusterings. Fixed seed.

    Raises `ValueError` for bytes that do not match the trace's tokens.
    """
    _check_bytes(trace, byte_T)
    check_int("shuffles", shuffles, 1)
    rng = np.random.default_rng(0)
    explained = []
    for ids_TK in trace.expert_ids_LTK:
        known_T = trace.valid_T & (ids_TK[:, 0] >= 0)
        expert_t, byte_t = ids_TK[known_T, 0].long().numpy(), byte_T[known_T].long().numpy()
        if not len(expert_t):
            raise ValueError("a layer has no token with a first expert")
        chance = np.mean([_information(rng.permutation(byte_t), expert_t) for _ in range(shuffles)])
        room = _entropy(expert_t) - chance
        explained.append((_information(byte_t, expert_t) - chance) / room if room > 1e-12 else 1.0)
    return torch.tensor(explained, dtype=torch.float64)


def _windows(trace: RoutingTrace, window: int) -> tuple[Int[Tensor, " T"], Int[Tensor, " W"]]:
    """Each token's window, -1 for none, and the first token of each window."""
    check_int("window", window, 1)
    per_document = 2**31 // window + 1
    key_T = trace.document_T.long() * per_document + trace.position_T.long() // window
    key_T = torch.where(trace.valid_T, key_T, -1)
    keys_U, window_T, size_U = key_T.unique(return_inverse=True, return_counts=True)
    whole_U = (size_U == window) & (keys_U >= 0)
    if not whole_U.any():
        raise ValueError(f"window={window}: no document of this trace has a whole window")
    number_U = torch.where(whole_U, whole_U.cumsum(0) - 1, -1)
    window_T = number_U[window_T]
    token_T = torch.arange(trace.num_tokens)
    kept_T = window_T >= 0
    first_W = torch.full((int(whole_U.sum()),), trace.num_tokens)
    first_W = first_W.scatter_reduce(0, window_T[kept_T], token_T[kept_T], "amin")
    return window_T, first_W


def _sums(rows_WF: Tensor, label_W: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    sums_DF = torch.zeros(num_labels, rows_WF.shape[1], dtype=rows_WF.dtype).index_add(0, label_W, rows_WF)
    return sums_DF, torch.bincount(label_W, minlength=num_labels)


def _nearest(rows_VF: Tensor, sums_DF: Tensor, count_D: Tensor) -> Tensor:
    centroid_DF = sums_DF / count_D.clamp(min=1)[:, None]
    return torch.cdist(rows_VF, centroid_DF).masked_fill(count_D == 0, torch.inf).argmin(dim=1)


def _leave_one_document_out(root_WF: Tensor, histograms: Histograms) -> Tensor:
    domain_W, document_W, domains = histograms.domain_W, histograms.document_W, histograms.domains
    sums_DF, count_D = _sums(root_WF, domain_W, len(domains))
    named_W = torch.empty_like(domain_W)
    for document in document_W.unique():
        own_W = document_W == document
        own_sums_DF, own_count_D = _sums(root_WF[own_W], domain_W[own_W], len(domains))
        rest_D = count_D - own_count_D
        if not rest_D[domain_W[own_W]].all():
            domain = domains[int(domain_W[own_W][0])]
            raise ValueError(f"domain {domain!r} has windows of one document only: none to learn from")
        named_W[own_W] = _nearest(root_WF[own_W], sums_DF - own_sums_DF, rest_D)
    return named_W


def _entropy(value_t: NDArray[np.int64]) -> float:
    """Plug-in entropy in nats of values >= 0."""
    counts = np.bincount(value_t)
    shares = counts[counts > 0] / len(value_t)
    return float(-(shares * np.log(shares)).sum())


def _information(a_t: NDArray[np.int64], b_t: NDArray[np.int64]) -> float:
    """Plug-in mutual information in nats."""
    return _entropy(a_t) + _entropy(b_t) - _entropy(a_t * (int(b_t.max()) + 1) + b_t)


def _check_bytes(trace: RoutingTrace, byte_T: Tensor) -> None:
    if byte_T.dtype != torch.uint8 or tuple(byte_T.shape) != (trace.num_tokens,):
        raise ValueError(
            f"byte_T of {byte_T.dtype} {tuple(byte_T.shape)} must be uint8, one byte for each of "
            f"{trace.num_tokens} tokens"
        )
