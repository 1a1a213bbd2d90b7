"""Encoders of speech: Whisper.

    waveform ─resample─▶ (samples,) int16 at 16 kHz ─cut into 30 s─▶ windows ─log-mel─▶ convolutions, blocks ─▶ (ΣF, C)
              SpeechTransform.prepare                SpeechTransform.collate  on the device

One feature stands for 320 samples, 20 ms. A recording longer than 30 s is encoded window by window, as Whisper
transcribes it: positions begin anew in every window and attention stays within it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from mm.bounds import Few, Width
from mm.encoders.base import Encoder, Grid, Transform
from mm.layers.precision import wide_dtype
from mm.media import BrokenMedia, SpeechFacts, Waveform
from mm.pretrained import from_pretrained
from mm.sample import Modality

RATE = 16_000
"""Samples a second that Whisper hears."""
FFT = 400
HOP = 160
"""Samples between two mel frames."""
STRIDE = 2 * HOP
"""Samples between two features: the second convolution halves the mel frames."""
WINDOW = 30 * RATE
"""Samples of the longest window."""
LARGEST_FILTER = 2**24
"""Most values of the filter by which torchaudio resamples a rate to 16 kHz, about the product of both without their
common divisor: 2^17 for CDs. While it is computed it takes some 16 bytes for each value."""
LARGEST_PHASES = 2**22
"""Most values of the filter of `resample_by_phase`, which leaves out the zeros: about 12 times the rate without what it
has in common with 16 kHz."""
ZEROS = 6
"""Zero crossings of the filter on each side of its middle, as in `torchaudio.functional.resample`."""
ROLLOFF = 0.99
"""Share of the lower Nyquist frequency that passes, as there."""


@dataclass(frozen=True, slots=True)
class SpeechTransform(Transform):
    """Waveforms to windows of at most 30 s at 16 kHz.

    pad_to_30s: fill every window up to 30 s with silence
    """

    modality: ClassVar[Modality] = Modality.SPEECH

    pad_to_30s: bool = True

    def grid(self, facts: SpeechFacts) -> Grid:
        """One feature for every 20 ms begun, at least one."""
        return (_features(_resampled(facts.frames, facts.rate)),)

    def prepare(self, item: Waveform) -> Tensor:
        """(samples,) int16 at 16 kHz, of exactly the length that the header promised.

        16 bits are what Whisper's own loader gives; they are half of the bytes to carry, and no mixed-precision policy
        rounds them to bfloat16 on the way into the encoder.

        Raises:
            BrokenMedia: a sampling rate that no recorder uses and whose resampling filter would fill the memory.
        """
        common, around = math.gcd(item.rate, RATE), 14  # values that a filter has beyond its rate, on the slower side
        waveform = torch.from_numpy(np.asarray(item.samples, np.float32))
        length = _resampled(len(waveform), item.rate)
        if (item.rate // common + around) * (RATE // common + around) > LARGEST_FILTER:
            waveform = resample_by_phase(waveform, item.rate)
        elif item.rate != RATE:
            # Its own output length goes through a 32-bit float and may be off by some samples after 17 minutes.
            waveform = torchaudio.functional.resample(waveform, item.rate, RATE)
            waveform = F.pad(waveform, (0, max(0, length - len(waveform))))[:length]
        return (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16)

    def collate(self, prepared: Sequence[Tensor]) -> dict[str, Tensor]:
        """windows: (W, samples) int16; lengths: (W,) int64 features of each window; index: (ΣF,) int64 rows of the
        (W · longest) features that are no padding, item after item."""
        cuts = [window for samples in prepared for window in samples.split(WINDOW)]
        lengths = torch.tensor([_features(len(window)) for window in cuts])
        longest = int(lengths.max())
        # One more feature's worth of silence: the last frames of the longest window then see beyond their end what
        # every other window sees there, zeros.
        size = WINDOW if self.pad_to_30s else (longest + 1) * STRIDE
        windows = torch.stack([F.pad(window, (0, size - len(window))) for window in cuts])
        columns = WINDOW // STRIDE if self.pad_to_30s else longest
        index = (torch.arange(columns) < lengths[:, None]).flatten().nonzero().squeeze(1)
        return {"windows": windows, "lengths": lengths, "index": index}

    def dummy(self) -> tuple[Tensor, Grid]:
        # oneDNN's bf16 gradient of a convolution over one frame reads memory that nobody wrote: NaNs, now and then.
        # 32 frames remain more than one through five halvings.
        return torch.zeros(32 * STRIDE, dtype=torch.int16), (32,)


class WhisperEncoder(Encoder):
    """The encoder of Whisper, from a checkpoint or from scratch.

    Args:
        name_or_folder: name on the hub (``openai/whisper-small``) or a folder that `save_pretrained` wrote.
        pretrained: load its weights. Never read on the meta device.
        width, depth, heads, mels: sizes, needed from scratch. Given beside a name they save asking the hub for its
            configuration while planning; the checkpoint must have them.
        pad_to_30s: let the network see 30 s, filled up with silence, as pre-trained Whisper always did. Only the
            features of the recording itself are handed on. Without it windows are padded to the longest of the
            batch and masked: less work, for weights that were (or will be) trained so.
    """

    transform: SpeechTransform

    def __init__(
        self,
        name_or_folder: str | None = None,
        *,
        pretrained: bool = True,
        width: Width | None = None,
        depth: Few | None = None,
        heads: Width | None = None,
        mels: Few | None = None,
        pad_to_30s: bool = True,
    ) -> None:
        from transformers import AutoConfig, WhisperConfig, WhisperModel
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Tower

        super().__init__()
        sizes = {"d_model": width, "encoder_layers": depth, "encoder_attention_heads": heads, "num_mel_bins": mels}
        config: Any
        if None not in sizes.values():
            assert width is not None
            config = WhisperConfig(**sizes, encoder_ffn_dim=4 * width, attn_implementation="sdpa")  # type: ignore[arg-type]
        elif name_or_folder is not None:
            config = from_pretrained(AutoConfig, name_or_folder, attn_implementation="sdpa")
        else:
            raise ValueError("WhisperEncoder needs `name_or_folder`, or all of `width`, `depth`, `heads` and `mels`")

        if name_or_folder is not None and pretrained and torch.get_default_device().type != "meta":
            model = from_pretrained(WhisperModel, name_or_folder, dtype=torch.float32, attn_implementation="sdpa")
            self.tower: Any = model.get_encoder()
            for name, size in sizes.items():
                if size is not None and getattr(model.config, name) != size:
                    raise ValueError(f"{name_or_folder} has {name} = {getattr(model.config, name)}, not {size}")
        else:
            self.tower = Tower(config)
        if self.tower.config.max_source_positions != WINDOW // STRIDE:
            raise ValueError(
                f"{name_or_folder} has {self.tower.config.max_source_positions} positions; 30 s are {WINDOW // STRIDE}"
            )
        self.width = self.tower.config.d_model
        self.transform = SpeechTransform(pad_to_30s)

    def forward(self, windows: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
        """(ΣF, C) features. See `SpeechTransform.collate` for the inputs."""
        tower = self.tower
        dtype = tower.conv1.weight.dtype
        mel = log_mel(windows, tower.config.num_mel_bins, wide_dtype(dtype)).to(dtype)
        own: Tensor | None = None
        if not self.transform.pad_to_30s:
            mel = mel[..., :-2]
            own = torch.arange(mel.shape[-1] // 2, device=mel.device) < lengths[:, None]
            # Zeros beyond a window's end are what a convolution over that window alone reads there. The second one
            # never looks beyond.
            mel = mel * own.repeat_interleave(2, dim=1)[:, None]
        hidden = F.gelu(tower.conv2(F.gelu(tower.conv1(mel)))).transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight[: hidden.shape[1]]
        mask = None if own is None else own[:, None, None, :].expand(-1, 1, own.shape[1], -1)
        for block in tower.layers:
            hidden = block(hidden, mask)
        return tower.layer_norm(hidden.flatten(0, 1).index_select(0, index))

    def flops(self, grid: Grid) -> float:
        (frames,) = grid
        longest = WINDOW // STRIDE
        whole, rest = divmod(frames, longest)
        windows = [longest] * whole + ([longest if self.transform.pad_to_30s else rest] if rest else [])
        return sum(map(self._window_flops, windows))

    def _window_flops(self, frames: int) -> float:
        """Convolutions over 2F and F frames, and per block the projections, the feed-forward and F² attention."""
        config, width = self.tower.config, self.width
        convolutions = 2 * 3 * width * (2 * frames * config.num_mel_bins + frames * width)
        block = frames * (8 * width**2 + 4 * width * config.encoder_ffn_dim) + 4 * frames**2 * width
        return float(convolutions + config.encoder_layers * block)

    def blocks(self) -> list[nn.Module]:
        return list(self.tower.layers)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def log_mel(windows: Tensor, mels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(W, mels, samples / 160) log-mel spectrogram, as `transformers.WhisperFeatureExtractor` computes it.

    Args:
        windows: (W, samples) int16 at 16 kHz, samples a multiple of 160.
        dtype: float32 or float64, in which all is computed. How float32 rounds depends on the shape of the batch.
    """
    waves = windows.to(dtype) / 32768
    hann = torch.hann_window(FFT, dtype=dtype, device=waves.device)
    spectrum = torch.stft(waves, FFT, HOP, window=hann, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    levels = (_mel_filters(mels, dtype, waves.device) @ power).clamp(min=1e-10).log10()
    loudest = levels.amax(dim=(1, 2), keepdim=True)
    return (levels.maximum(loudest - 8.0) + 4.0) / 4.0


@lru_cache(maxsize=8)
def _mel_filters(mels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(mels, 201) triangular filters between 0 and 8 kHz."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(1 + FFT // 2, mels, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T).to(device, dtype)


def resample_by_phase(waveform: Tensor, rate: int) -> Tensor:
    """(samples,) float32 at 16 kHz of (frames,) float32 at a rate, as `torchaudio.functional.resample` defines it.

    Samples lie between two frames at some of up to 16,000 phases. For each, torchaudio keeps a filter that is zero but
    for a few of its `rate` values; for the 22254 Hz of early computers that is a gigabyte. This one keeps those few.

    Raises:
        BrokenMedia: they are too many, too.
    """
    scale = min(1.0, RATE / rate) * ROLLOFF  # zero crossings of the filter per frame
    reach = math.ceil(ZEROS / scale)
    length, phases = _resampled(len(waveform), rate), RATE // math.gcd(rate, RATE)
    if phases * (2 * reach + 1) > LARGEST_PHASES:
        raise BrokenMedia(f"sampling rate of {rate} Hz, which has too small a common divisor with {RATE}")
    ticks = torch.arange(min(length, phases)) * rate  # RATE of them are a frame
    taps = torch.arange(2 * reach + 1)
    crossings = (taps - reach - (ticks % RATE)[:, None].double() / RATE) * scale
    crossings.clamp_(-ZEROS, ZEROS)
    hann = torch.cos(crossings * (math.pi / ZEROS / 2)).square()
    filters = (torch.sinc(crossings) * hann * scale).float()  # (phases, taps)
    frames = F.pad(waveform, (reach, reach + 1))
    resampled = torch.empty(length)
    for start in range(0, length, phases):
        block = resampled[start : start + phases]
        samples = torch.arange(start, start + len(block))
        near = frames[(samples * rate // RATE)[:, None] + taps]
        torch.sum(near.mul_(filters[: len(block)]), 1, out=block)
    return resampled


def _resampled(frames: int, rate: int) -> int:
    """Samples after resampling to 16 kHz, rounded up."""
    return -(-frames * RATE // rate)


def _features(samples: int) -> int:
    """Features of a recording: 1500 for every whole window of 30 s, and one for every 20 ms begun."""
    return max(1, -(-samples // STRIDE))
