"""The augmentation of `spotter.data.augment` for batches on a device: the same distributions, drawn once per clip, as tensor code."""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from spotter.core import AugmentParams
from spotter.data.loader import MEAN, STD

# quantisation of brightness and of colour at quality 50: annex K of the JPEG standard (ITU-T T.81)
LUMA = torch.tensor([[16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
                     [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
                     [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]], dtype=torch.float32)
CHROMA = torch.full((8, 8), 99.)
CHROMA[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]], dtype=torch.float32)


@dataclass
class Draws:
    "What is drawn for each of B clips."
    top: np.ndarray; left: np.ndarray; window: np.ndarray   # (B,) ints: the square that is cut out, in pixels, possibly beyond the crop
    flip: np.ndarray        # (B,) bool
    factors: np.ndarray     # (B, 3) of brightness, contrast, saturation
    order: np.ndarray       # (B, 3) permutations of these three
    blur: np.ndarray        # (B,) standard deviation in pixels; 0: no blur
    quality: np.ndarray     # (B,) of JPEG; 0: no JPEG


def draw(
    params: AugmentParams,
    side: int,                  # of the stored crops, in pixels
    clips: int,                 # B
    rng: np.random.Generator,
) -> Draws:
    "Draw as `make_augmentation` does."
    scale, dx, dy = rng.uniform(-1, 1, (3, clips))
    window = np.round(side*(1 + scale*params.zoom)).astype(int)
    top, left = (np.round((side - window)/2 + d*params.shift*side).astype(int) for d in (dy, dx))
    c = params.colour
    return Draws(top, left, window, rng.random(clips) < params.flip, rng.uniform(max(0, 1 - c), 1 + c, (clips, 3)),
                 rng.permuted(np.tile(np.arange(3), (clips, 1)), axis=1),
                 np.where(rng.random(clips) < params.blur, rng.uniform(.3, 1.5, clips), 0),
                 np.where(rng.random(clips) < params.jpeg, rng.integers(50, 96, clips), 0))


def reflected(
    places: torch.Tensor,   # ints, at most `side` - 1 beyond the crop
    side: int,
) -> torch.Tensor:          # 0 … side - 1
    "Pixels of the crop that pixels around it mirror; the border itself is not repeated."
    places = places.abs()
    return torch.where(places >= side, 2*(side - 1) - places, places)


def resize_weights(
    start: torch.Tensor,    # (B,) first pixel of the window
    window: torch.Tensor,   # (B,) its side in pixels
    reach: int,             # the largest side of a window
    side: int,              # of the crop
    size: int,              # of the result
) -> torch.Tensor:          # (B, size, side): weight of each pixel of the crop in each pixel of the result
    "Bilinear interpolation with antialiasing of a window with mirrored surroundings, along one axis."
    j, scale = torch.arange(reach, device=start.device), (window/size)[:, None, None]
    centre = (torch.arange(size, device=start.device)[None, :, None] + .5)*scale
    weight = (1 - (j + .5 - centre).abs()/scale.clamp(min=1)).clamp(min=0)*(j < window[:, None, None])
    weight = weight/weight.sum(2, keepdim=True)
    source = reflected(start[:, None] + j, side).clamp(0, side - 1)          # clamped where the weight is 0
    chosen = source[..., None] == torch.arange(side, device=start.device)
    return weight @ chosen.to(weight.dtype)    # a product, since adding up in place has no fixed order on a GPU


def crop_and_resize(
    frames: torch.Tensor,   # (B, T, S, S, 3) uint8
    masks: torch.Tensor,    # (B, T, S, S) uint8
    draws: Draws,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T, 3, size, size) float32 in whole grey levels, (B, T, size, size) uint8
    "`WanderingCrop`: frames by interpolation, masks by the nearest pixel."
    side, device = frames.shape[2], frames.device
    top, left, window = (torch.from_numpy(x).to(device) for x in (draws.top, draws.left, draws.window))
    rows, columns = (resize_weights(start, window, int(draws.window.max()), side, size) for start in (top, left))
    out = torch.einsum("bxw,btywc->btcyx", columns, torch.einsum("byh,bthwc->btywc", rows, frames.float()))
    nearest = (torch.arange(size, device=device)*(window[:, None]/size)).long()   # in float32, as PyTorch does it
    y, x = (reflected(start[:, None] + nearest, side) for start in (top, left))
    clips = torch.arange(len(frames), device=device)[:, None, None]
    return out.round().clamp(0, 255), masks[clips, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def grey(x: torch.Tensor) -> torch.Tensor:
    "Brightness of (…, 3, H, W), as (…, 1, H, W) in whole levels."
    return (x*x.new_tensor([.2989, .587, .114])[:, None, None]).sum(-3, keepdim=True).floor()


def jitter(
    x: torch.Tensor,   # (B, T, 3, H, W) in whole grey levels
    draws: Draws,
) -> torch.Tensor:
    "Brightness, contrast and saturation, in each clip's order; each is a blend with black, with the mean grey, or with the own grey."
    factors = np.take_along_axis(draws.factors, draws.order, 1)
    for k in range(3):
        factor = torch.from_numpy(factors[:, k]).to(x)[:, None, None, None, None]
        kind = torch.from_numpy(draws.order[:, k]).to(x.device)[:, None, None, None, None]
        own = grey(x)
        base = torch.where(kind == 2, own, torch.where(kind == 1, own.mean((-3, -2, -1), keepdim=True), 0.))
        x = (x*factor + base*(1 - factor)).clamp(0, 255).floor()
    return x


def gaussian_blur(
    x: torch.Tensor,       # (B, T, 3, H, W) in whole grey levels
    sigma: torch.Tensor,   # (B,) above 0
) -> torch.Tensor:
    "Blur with a kernel of five pixels."
    kernel = torch.softmax(-(torch.arange(-2, 3, device=x.device)/sigma[:, None])**2/2, 1)       # (B, 5)
    kernel = kernel.repeat_interleave(x.shape[1]*3, 0)[:, None]                                  # one for each picture
    flat = F.pad(x.flatten(0, 2)[None], (2, 2, 2, 2), mode="reflect")
    for shape in ((5, 1), (1, 5)): flat = F.conv2d(flat, kernel.view(-1, 1, *shape), groups=len(kernel))
    return flat.view(x.shape).round()


def _cosines(device) -> torch.Tensor:
    "Matrix (8, 8) of the orthonormal discrete cosine transform."
    k, n = torch.arange(8, device=device)[:, None], torch.arange(8, device=device)
    m = torch.cos(math.pi*(n + .5)*k/8)/2
    m[0] /= math.sqrt(2)
    return m


def _coded(
    x: torch.Tensor,       # (N, C, H, W) in whole levels around 0
    table: torch.Tensor,   # (N, 8, 8) of quantisation
) -> torch.Tensor:
    "Cosine transform of blocks, rounded to multiples of the table, and back."
    h, w = x.shape[-2:]
    x = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    blocks, m = x.unfold(2, 8, 8).unfold(3, 8, 8), _cosines(x.device)         # (N, C, h, w, 8, 8)
    table = table[:, None, None, None]
    blocks = m.T @ ((m @ blocks @ m.T/table).round()*table) @ m
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)[..., :h, :w]


def jpeg(
    x: torch.Tensor,         # (N, 3, H, W) in whole grey levels
    quality: torch.Tensor,   # (N,) 1 … 100
) -> torch.Tensor:
    """What a JPEG file keeps: colour at half resolution, blocks of 8×8 pixels quantised with the standard's tables at libjpeg's scale.
    The entropy coding that follows in a file loses nothing, so it is left out."""
    scale = torch.where(quality < 50, 5000/quality, 200 - 2*quality)[:, None, None]
    luma, chroma = ((table.to(x.device)*scale/100 + .5).floor().clamp(1, 255) for table in (LUMA, CHROMA))
    r, g, b = x.unbind(1)
    y = (.299*r + .587*g + .114*b).round()
    cb, cr = (((c - .299*r - .587*g - .114*b)/k + 128).round().clamp(0, 255) for c, k in ((b, 1.772), (r, 1.402)))
    h, w = y.shape[-2:]
    colour = F.pad(torch.stack([cb, cr], 1), (0, w % 2, 0, h % 2), mode="replicate")
    colour = _coded(F.avg_pool2d(colour, 2).round() - 128, chroma).round().clamp(-128, 127)
    cb, cr = F.interpolate(colour, scale_factor=2, mode="bilinear")[..., :h, :w].unbind(1)
    y = (_coded(y[:, None] - 128, luma)[:, 0].round() + 128).clamp(0, 255)
    return torch.stack([y + 1.402*cr, y - .344136*cb - .714136*cr, y + 1.772*cb], 1).round().clamp(0, 255)


@torch.no_grad()
def augment(
    frames: torch.Tensor,   # (B, T, S, S, 3) uint8 RGB
    masks: torch.Tensor,    # (B, T, S, S) uint8 0/1
    draws: Draws,
    size: int,              # side of the result
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T, 3, size, size) float32 in whole grey levels, (B, T, size, size) float32 0/1
    "Crop, flip, colour, blur and JPEG in the order of `make_augmentation`."
    x, m = crop_and_resize(frames, masks, draws, size)
    flip = torch.from_numpy(draws.flip).to(x.device)
    x, m = torch.where(flip[:, None, None, None, None], x.flip(-1), x), torch.where(flip[:, None, None, None], m.flip(-1), m)
    if (draws.factors != 1).any(): x = jitter(x, draws)
    for values, change in ((draws.blur, gaussian_blur), (draws.quality, _jpeg_of_clips)):
        chosen = np.flatnonzero(values)
        if len(chosen):
            picked = torch.from_numpy(chosen).to(x.device)
            x = x.index_copy(0, picked, change(x[picked], torch.from_numpy(values[chosen]).to(x)))
    return x, m.float()


def _jpeg_of_clips(x: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    "`jpeg` of (B, T, 3, H, W)."
    return jpeg(x.flatten(0, 1), quality.repeat_interleave(x.shape[1])).view(x.shape)


def normalised(
    x: torch.Tensor,   # (…, 3, H, W) in grey levels
) -> torch.Tensor:
    "The network's input."
    mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (x/255 - mean)/std
