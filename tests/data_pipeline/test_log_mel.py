"""Log-mel frames against those of Hugging Face's Whisper, and against sums over sines and cosines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from data_pipeline.log_mel import frame_count, log_mel, mel_filters, most_mels, samples_of


def sound(samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Two rising tones in noise."""
    times = np.arange(samples) / 16_000
    tones = np.sin(2 * np.pi * (300 + 900 * times) * times) + 0.3 * np.sin(2 * np.pi * 2500 * times)
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.4 * tones + 0.02 * noise).astype(np.float32)


@pytest.mark.parametrize(
    ("rate", "mels", "milliseconds"),
    [(16_000, 80, 25), (8000, 40, 25), (22_050, 64, 32), (44_100, 128, 40), (16_000, 1, 5)],
)
def test_filters_are_those_of_transformers(rate: int, mels: int, milliseconds: int) -> None:
    window = samples_of(milliseconds, rate)
    bins = window // 2 + 1
    # There the last bin is taken for half the rate, which it is of an even window alone.
    assert window % 2 == 0, "a window that both sides understand alike"
    expected = mel_filter_bank(bins, mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(rate, mels, milliseconds), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("samples", [16_000, 7_777, 480])
def test_frames_are_those_of_whisper(samples: int) -> None:
    """It computes in fp32: within 1e-4, which is 0.004 dB."""
    whisper = WhisperFeatureExtractor(feature_size=80, sampling_rate=16_000, hop_length=160, n_fft=400)
    given = sound(samples)
    expected = whisper(given, sampling_rate=16_000, padding=False, truncation=False, return_tensors="np")
    frames = np.asarray(expected["input_features"])[0].T
    found = log_mel(given, sample_rate=16_000)
    assert found.dtype == np.float32
    assert found.shape == (frame_count(samples, 16_000), 80) == frames.shape
    np.testing.assert_allclose(found, frames, atol=1e-4)


def naive_frame(samples: NDArray[np.float32], centre: int, window: int) -> NDArray[np.float64]:
    """Power of one window by the definition of the transform, with the samples mirrored at both ends."""
    last = len(samples) - 1

    def at(index: int) -> float:
        folded = index % (2 * last)
        return float(samples[folded if folded <= last else 2 * last - folded])

    power = np.zeros(window // 2 + 1)
    for bin_ in range(len(power)):
        real = imaginary = 0.0
        for k in range(window):
            weight = math.sin(math.pi * k / window) ** 2
            angle = 2.0 * math.pi * bin_ * k / window
            value = weight * at(centre - window // 2 + k)
            real, imaginary = real + value * math.cos(angle), imaginary - value * math.sin(angle)
        power[bin_] = real**2 + imaginary**2
    return power


@pytest.mark.parametrize(
    ("rate", "window_milliseconds", "hop_milliseconds", "mels"),
    [(8000, 25, 10, 40), (11_025, 5, 3, 4), (8000, 10, 20, 8)],
)
def test_frames_are_sums_over_sines_and_cosines(
    rate: int, window_milliseconds: int, hop_milliseconds: int, mels: int
) -> None:
    window, hop = samples_of(window_milliseconds, rate), samples_of(hop_milliseconds, rate)
    given = sound(3 * hop + 7, seed=1)
    power = np.stack([naive_frame(given, frame * hop, window) for frame in range(3)])
    levels = np.log10(np.maximum(power @ mel_filters(rate, mels, window_milliseconds), 1e-10))
    expected = (np.maximum(levels, levels.max() - 8.0) + 4.0) / 4.0
    found = log_mel(
        given,
        sample_rate=rate,
        mels=mels,
        window_milliseconds=window_milliseconds,
        hop_milliseconds=hop_milliseconds,
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_windows_of_an_odd_number_of_samples_are_met_above() -> None:
    assert samples_of(5, 11_025) == 55
    assert (samples_of(10, 22_050), samples_of(25, 22_050)) == (221, 551), "the nearest, halves up"


def test_silence_is_finite_and_does_not_drown_what_is_heard() -> None:
    assert np.all(log_mel(np.zeros(1600, np.float32), sample_rate=16_000) == -1.5)
    with_gap = np.concatenate((sound(1600), np.zeros(3200, np.float32)))
    found = log_mel(with_gap, sample_rate=16_000)
    assert found.min() == pytest.approx(found.max() - 2.0), "80 dB are 8 decades, in quarters"


@pytest.mark.parametrize(("rate", "milliseconds"), [(8000, 25), (16_000, 25), (16_000, 10)])
def test_silent_filters_are_refused_and_the_nearest_that_are_not_named(rate: int, milliseconds: int) -> None:
    most = most_mels(rate, milliseconds)
    assert mel_filters(rate, most, milliseconds).max(axis=0).min() > 0.0
    with pytest.raises(ValueError, match=f"Set mels to {most} at most"):
        mel_filters(rate, most + 1, milliseconds)


def test_less_than_a_hop_is_refused() -> None:
    assert log_mel(sound(160), sample_rate=16_000).shape == (1, 80)
    with pytest.raises(ValueError, match="159 samples"):
        log_mel(sound(159), sample_rate=16_000)
