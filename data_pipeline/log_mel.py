"""Log-mel frames of sound, as Whisper makes them (arXiv 2212.04356, section 2.2): numpy alone, for data workers.

Mel is that of Slaney's Auditory Toolbox (Technical Report 1998-010, Interval Research): linear up to 1,000 Hz, 3 a 200
Hz, and logarithmic from there on, 27 a factor of 6.4. His filters are triangles over Hz from one neighbour's top to the
other's, each of area 1.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

_LINEAR_HZ = 200.0 / 3.0
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27.0
_LEAST_POWER = 1e-10
_DECADES = 8.0
"""Below the loudest value nothing is told apart: 80 dB."""


def samples_of(milliseconds: int, sample_rate: int) -> int:
    """Whole samples of a duration, the nearest, halves up."""
    return (2 * milliseconds * sample_rate + 1000) // 2000


def frame_count(samples: int, sample_rate: int, hop_milliseconds: int = 10) -> int:
    """Frames of so many samples: one a whole hop."""
    return samples // samples_of(hop_milliseconds, sample_rate)


def mel_filters(sample_rate: int, mels: int, window_milliseconds: int = 25) -> NDArray[np.float64]:
    """The filters, (W // 2 + 1, mels) for a window of W samples, from 0 Hz to half the rate.

    Args:
        sample_rate: Hz.

    Raises:
        ValueError: the filters are so narrow that one has no frequency of the window's in it, and would always be
            silent.
    """
    filters = _triangles(sample_rate, mels, samples_of(window_milliseconds, sample_rate))
    silent = int((filters.max(axis=0) == 0.0).sum())
    if silent:
        most = most_mels(sample_rate, window_milliseconds)
        raise ValueError(
            f"{mels} mels at {sample_rate} Hz with a window of {window_milliseconds} ms: {silent} filters are narrower "
            f"than a frequency of the window's, {1000 / window_milliseconds:g} Hz, and always silent. Set mels to "
            f"{most} at most, or give a longer window"
        )
    return filters


def most_mels(sample_rate: int, window_milliseconds: int = 25) -> int:
    """The most filters of which none is silent, nor any of fewer."""
    window = samples_of(window_milliseconds, sample_rate)
    mels = 1
    while _triangles(sample_rate, mels + 1, window).max(axis=0).min(initial=1.0) > 0.0:
        mels += 1
    return mels


@cache
def _triangles(sample_rate: int, mels: int, window: int) -> NDArray[np.float64]:
    edges = _hz(np.linspace(0.0, _mel(sample_rate / 2.0), mels + 2))
    left, top, right = edges[:-2], edges[1:-1], edges[2:]
    hz = (np.arange(window // 2 + 1) * sample_rate / window)[:, None]
    rising, falling = (hz - left) / (top - left), (right - hz) / (right - top)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (right - left)
    filters.setflags(write=False)
    return filters


def _mel(hz: float) -> float:
    return hz / _LINEAR_HZ if hz < _BREAK_HZ else _BREAK_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(
        mel < _BREAK_MEL, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(np.maximum(mel - _BREAK_MEL, 0.0) * _LOG_STEP)
    )


def log_mel(
    samples: NDArray[np.floating],
    *,
    sample_rate: int,
    mels: int = 80,
    window_milliseconds: int = 25,
    hop_milliseconds: int = 10,
) -> NDArray[np.float32]:
    """Frames of one recording, with the default values those of Whisper.

    The power of each window (Hann's, periodic, centred on multiples of the hop, the ends mirrored) through
    `mel_filters`, log10, cut off 8 below the largest, and (x + 4) / 4: about -1 to 1.5.

    Args:
        samples: (n,) between -1 and 1.
        sample_rate: Hz.

    Returns:
        (`frame_count`, mels), a function of this recording alone: pad frames, not samples.

    Raises:
        ValueError: fewer samples than a hop, or filters that are always silent (see `mel_filters`).
    """
    window, hop = (samples_of(each, sample_rate) for each in (window_milliseconds, hop_milliseconds))
    frames = frame_count(len(samples), sample_rate, hop_milliseconds)
    if not frames:
        raise ValueError(
            f"{len(samples)} samples at {sample_rate} Hz are less than a hop of {hop_milliseconds} ms, {hop} samples: "
            "no frame comes of them. Leave such recordings out"
        )
    filters = mel_filters(sample_rate, mels, window_milliseconds)
    mirrored = np.pad(samples.astype(np.float64), window // 2, mode="reflect")
    cut = np.lib.stride_tricks.sliding_window_view(mirrored, window)[::hop][:frames]
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(window) / window)
    power = np.abs(np.fft.rfft(cut * hann, axis=1)) ** 2
    levels = np.log10(np.maximum(power @ filters, _LEAST_POWER))
    levels = np.maximum(levels, levels.max() - _DECADES)
    frame_levels: NDArray[np.float32] = ((levels + 4.0) / 4.0).astype(np.float32)
    return frame_levels
