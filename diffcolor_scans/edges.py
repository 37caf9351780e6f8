"""Edge-aware propagation [O]: chroma that stops where the scan's own luminance does, after Levin et al. 2004.

What the model gives is soft where things end, since a latent cell covers several pixels. So chroma is solved for
anew: neighbours of like lightness get like chroma, and the model's value counts little near an edge, where it is a
mixture of both sides. The solver is OpenCV's fast global smoother (Min et al. 2014), a separable weighted least
squares whose cost is linear in the pixels. It smooths confidence times value and the confidence alike; their
quotient is the solution.

Up to `SOLVED_PX` pixels the chroma is solved for at the scan's own size. Beyond, it is a local linear function of
L*, whose coefficients are interpolated (He and Sun 2015, fast guided filter).
"""

import cv2
import numpy as np
import torch
from torch import Tensor

SOLVED_PX = 500_000
_SIGMA = 1.0  # the smoother's, in L* x 2.55: neighbours that differ by more are hardly connected
_SMOOTHNESS = 50.0  # at working size, against fidelity
_SMOOTHNESS_ENLARGED = 500.0  # after enlarging, where the scan's edges are sharper than the values
_EDGE = 3.0  # L* per pixel at which a value counts 1/e
_REACH_PX = 2  # values so near to an edge are taken for mixtures
_RIDGE = 1.0  # L*^2, regularises the local linear function


def propagate(values: Tensor, lightness: Tensor, *, smoothness: float = _SMOOTHNESS) -> Tensor:
    """Values [C, h, w], chroma or a region's share, solved for anew along `lightness` [1, h, w], 0..100."""
    guide = _rows_of(lightness)[..., 0]
    slope = np.hypot(*np.gradient(guide)) if min(guide.shape) > 1 else np.zeros_like(guide)
    side = 2 * _REACH_PX + 1
    confidence = cv2.erode(np.exp(-slope / _EDGE).astype(np.float32), np.ones((side, side), np.uint8)) + 1e-4
    steps = np.clip(guide * 2.55, 0, 255).round().astype(np.uint8)
    planes = (*(_rows_of(values) * confidence[..., None]).transpose(2, 0, 1), confidence)
    *solved, weight = (cv2.ximgproc.fastGlobalSmootherFilter(steps, plane, smoothness, _SIGMA) for plane in planes)
    return torch.from_numpy(np.stack([plane / weight for plane in solved]))


class ChromaField:
    """Chroma of working size, to be read strip by strip at the scan's size.

    chroma: [2, h, w]. lightness: the scan's, [1, H, W].
    """

    def __init__(self, chroma: Tensor, lightness: Tensor) -> None:
        self._size = height, width = lightness.shape[-2:]
        scale = min(1.0, (SOLVED_PX / (height * width)) ** 0.5)
        self._solved_at_full_size = scale == 1.0
        size = (max(1, round(width * scale)), max(1, round(height * scale)))  # OpenCV's order
        guide = cv2.resize(_rows_of(lightness), size, interpolation=cv2.INTER_AREA).reshape(size[1], size[0])
        planes = _rows_of(chroma)
        if planes.shape[:2] != guide.shape:
            enlarged = torch.from_numpy(cv2.resize(planes, size, interpolation=cv2.INTER_LINEAR)).permute(2, 0, 1)
            planes = _rows_of(propagate(enlarged, torch.from_numpy(guide)[None], smoothness=_SMOOTHNESS_ENLARGED))
        self._planes = planes if self._solved_at_full_size else _linear_coefficients(planes, guide)

    def rows(self, rows: slice, guide: Tensor) -> Tensor:
        """Chroma [2, R, W] of the strip `rows`, whose lightness `guide` is [1, R, W]."""
        if self._solved_at_full_size:
            return torch.from_numpy(self._planes[rows].transpose(2, 0, 1).copy())
        height, width = self._size
        last = len(self._planes) - 1
        y = ((np.arange(rows.start, rows.stop) + 0.5) * (last + 1) / height - 0.5).clip(0, last)
        above = np.floor(y).astype(int)
        share = (y - above).astype(np.float32)[:, None, None]
        narrow = self._planes[above] * (1 - share) + self._planes[np.minimum(above + 1, last)] * share  # [R, w, 4]
        wide = cv2.resize(narrow, (width, len(narrow)), interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy((wide[..., :2] * _rows_of(guide) + wide[..., 2:]).transpose(2, 0, 1).copy())


def _linear_coefficients(chroma: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """Slopes and offsets of a* and b* over L* in windows of 3 x 3, averaged over the windows: [h, w, 4]."""

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, (3, 3), borderType=cv2.BORDER_REFLECT)

    mean_guide, mean_chroma = mean(guide)[..., None], mean(chroma)
    variance = mean(guide * guide)[..., None] - mean_guide**2
    slope = (mean(guide[..., None] * chroma) - mean_guide * mean_chroma) / (variance + _RIDGE)
    return np.dstack((mean(slope), mean(mean_chroma - slope * mean_guide)))


def _rows_of(x: Tensor) -> np.ndarray:
    """[C, h, w] as an array [h, w, C], float32, as OpenCV has it."""
    return np.ascontiguousarray(x.cpu().permute(1, 2, 0).numpy().astype(np.float32))
